"""What is released: a wheel of the package alone, and an sdist from which it can be built and tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from lightning_pipelite import __version__

pytestmark = pytest.mark.process

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from the files in git, and the wheel from the sdist; return their directory."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    if not listed:
        pytest.skip("what belongs to the release is what git knows, and this is no checkout")
    for name in filter(lambda name: (ROOT / name).exists(), listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_pipelite").rglob("*.py")}
    package |= {f"lightning_pipelite/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert names == {*package, "lightning_pipelite/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        for path in (ROOT / "kernels").glob("*.py"):  # files, not a dangling link
            assert archive.read(f"lightning_pipelite/kernels/{path.name}") == path.read_bytes()
        (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "pipelite = lightning_pipelite.cli:start" in archive.read(scripts).decode()


def test_the_sdist_can_be_built_and_tested(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
        top = sdist.name.removesuffix(".tar.gz")
        kernels = [archive.getmember(f"{top}/lightning_pipelite/kernels/{path.name}") for path in KERNELS]
        assert all(member.isfile() and member.size for member in kernels)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        "lightning_pipelite", "lightning_pipelite.egg-info", "kernels", "configs", "examples", "benchmarks", "tests",
        "docs", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "MANIFEST.in", "Makefile",
        "PKG-INFO", "constraints.txt",
        "constraints-lowest.txt", "mkdocs.yml", "pyproject.toml", "setup.cfg",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".ckpt", ".log"))]
    assert {"examples/style/more.txt", "tests/tiny_job.py", "benchmarks/results/exactness.md"} <= names


KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    """Exactly the lower bounds of pyproject.toml are pinned for `make versions`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", each) for each in project["dependencies"]]
    allowed = {bound[1]: Version(bound[2]) for bound in bounds if bound}
    assert len(allowed) == len(project["dependencies"])
    pinned = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE)
    assert {name: Version(version) for name, version in pinned} == allowed
