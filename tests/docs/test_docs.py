"""The documentation holds: links lead somewhere, pictures are drawn by their code, the table of old keys is true."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipelite.cli.base_name import with_own_names
from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.main import main
from lightning_pipelite.export.migration import Migration

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ROWS = re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "migration.md").read_text(encoding="utf-8"), re.MULTILINE)
COMMON = 'model_dir = "m"\noutput_dir = "o"\nsequence_len = 64\nlr = 1e-4\n'
OTHER: dict[str, str] = {
    "beta1": "0.5", "beta2": "0.95", "eps": "1e-7", "lora_dropout": "0.5", "lora_weight_dtype": '"bfloat16"',
    "target_modules": '["q_proj"]', "layers_to_transform": '"0:1"', "control_adapter_gamma": "0.25",
    "partition_method": '"parameters"', "eval_fraction": "0.5", "sequence_prefix": '"a"', "document_prefix": '"b"',
    "document_suffix": '"c"', "mask_tokens": "true", "lora_alpha": "8", "checkpoint_interval_hours": "2",
    "lora_weight_decay": "3.5",
}  # fmt: skip
SWITCHES = {"load_in_4bit", "use_control_adapters", "full_fine_tune", "use_column_major_topology", "drop_tails"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """In the repository; `make docs` checks those of the site, with their anchors."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        generated = page == DOCS / "results.md"
        assert generated or (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packing", "control_adapter", "schedule"])
def test_pictures_are_drawn_by_their_code(name: str, tmp_path: Path) -> None:
    output = tmp_path / f"{name}.svg"
    command = [sys.executable, str(DOCS / "pictures" / f"{name}.py"), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # Glyphs and coordinates are matplotlib's own; the texts, kept as comments, and the number of shapes are ours.
    kept = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    drawn = output.read_text(encoding="utf-8")
    assert re.findall(r"<!--(.*?)-->", drawn) == re.findall(r"<!--(.*?)-->", kept)
    assert drawn.count("<g id=") == kept.count("<g id=")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?:^|`)pipelite (?!checkpoint`)([a-z][a-z-]*)([^`\n]*)", text, re.MULTILINE):
        if name in ("fit", "validate", "plan"):
            for config in re.findall(r"--config (configs/\S+)", rest):
                assert (ROOT / config).is_file()
            continue
        command = COMMANDS[name]
        known = inspect.signature(getattr(importlib.import_module(command.module), command.function)).parameters
        words = with_own_names(name, re.findall(r"--\w+", rest))
        assert {word[2:] for word in words} <= set(known), f"pipelite {name}{rest}"


def test_python_blocks_compile_and_import() -> None:
    """Those of the README run; of the others what they import must be there."""
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            tree = ast.parse(block)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_pipelite"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


REFERENCE = [
    name
    for page in (DOCS / "reference").glob("*.md")
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]


def test_every_option_has_its_words() -> None:
    """What the reference shows of an option is its line in the docstring."""
    inner = {"accelerator", "parallel_devices"}  # which Lightning hands to every strategy
    for name in [*REFERENCE, *(f"{command.module}.{command.function}" for command in COMMANDS.values())]:
        module, _, attribute = name.rpartition(".")
        shown = getattr(importlib.import_module(module), attribute)
        options = {
            option for option, each in inspect.signature(shown).parameters.items() if each.kind != each.VAR_KEYWORD
        }
        said = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.getdoc(shown) or "", re.MULTILINE)
        assert set(re.findall(r"^    (\w+):", said[1], re.MULTILINE) if said else []) == options - inner, name


@pytest.mark.parametrize("package", ["callbacks", "adapters"])
def test_the_reference_has_what_is_public(package: str) -> None:
    public = set(importlib.import_module(f"lightning_pipelite.{package}").__all__) - {"Adapter"}  # their base class
    assert public <= {name.rpartition(".")[2] for name in REFERENCE}


def test_the_configuration_of_checkpoints_has_options_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line takes it, over that of a mode. tests/optim and test_readme have the other pages'."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "checkpoints.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "block.yaml").write_text(block)
    files = [f"--config={ROOT / 'configs' / 'lora.yaml'}", f"--config={tmp_path / 'block.yaml'}"]
    monkeypatch.setattr(sys, "argv", ["pipelite", "fit", *files, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err


def old(key: str) -> str:
    """A configuration of qlora-pipe-lite with this key set to what is not its default."""
    value = OTHER.get(key, "true" if key in SWITCHES | {"mix_datasets"} else "3")
    lines = {"lora_rank": "lora_rank = 16\n", "datasets": '[[datasets]]\ndataset_path = "x"\n'}
    if key == "control_adapter_gamma":
        lines["control"] = "use_control_adapters = true\n"
    if key == "evals_per_run":
        value = "4"
    text = "".join(line for name, line in lines.items() if name not in (key, "datasets"))
    if key not in ("model_dir", "output_dir", "sequence_len", "lr", "datasets"):
        text += f"{key} = {value}\n"
    return COMMON + text + lines["datasets"]


@pytest.mark.parametrize(("key", "here"), ROWS, ids=[key for key, _ in ROWS])
def test_old_keys_go_where_the_table_says(key: str, here: str, tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text(old(key))
    content = yaml.safe_load(Migration(tmp_path / "old.toml").yaml())
    if here.startswith("none"):
        return
    place = re.match(r"`([\w.]+)`", here)
    assert place
    found: Any = content
    for part in place[1].split("."):
        found = found[part]
    if ":" not in here and key not in ("model_dir", "datasets"):
        given = tomllib.loads((tmp_path / "old.toml").read_text())[key]
        assert found == given
    for option in re.findall(
        r": `(\w+)`|(Full|ControlAdapter|CompositeWeightDecay|TimedCheckpoint|EvalSchedule)", here
    ):
        assert next(filter(None, option)) in yaml.safe_dump(found)


def test_the_table_has_every_old_key() -> None:
    source = (ROOT / "lightning_pipelite" / "export" / "migration.py").read_text(encoding="utf-8")
    known = set(re.findall(r'_take\("(\w+)"', source)) | set(re.findall(r'for key, default in \(\("(\w+)"', source))
    assert known <= {key for key, _ in ROWS}


def make_docs(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, to another place."""
    recipe = re.search(
        r"^docs:.*\n\t\$\(BIN\)/mkdocs (.*) --site-dir site$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert recipe
    command = [sys.executable, "-m", "mkdocs", *recipe[1].split(), "--site-dir", str(site), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """As `make docs`: no warning, every link and anchor leads somewhere, every option of a public class is there."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    done = make_docs(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    options = (tmp_path / "reference" / "training" / "index.html").read_text(encoding="utf-8")
    for name in ("pipeline_stages", "activation_memory", "load_in_4bit", "timeout"):
        assert f"<code>{name}</code>" in options


@pytest.mark.parametrize("link", ["", "gone.md", "index.md#gone", "gone.png"])
def test_a_link_that_leads_nowhere_fails_the_build(link: str, tmp_path: Path) -> None:
    """Of a site of one page with the settings of ours."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Here\n\n[there]({link or '#here'})\n")
    ours = {"docs_dir": "docs", "nav": [{"Here": "index.md"}], "theme": {"name": "mkdocs"}, "plugins": [], "hooks": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"INHERIT": str(ROOT / "mkdocs.yml"), **ours, "extra_css": []}))
    done = make_docs(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == (1 if link else 0), done.stdout + done.stderr


def test_figures_of_the_readme_are_in_the_results() -> None:
    """Those of the table, in the results that stand before it; each further one, in those that are linked beside it."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## How fast")[1].split("\n## ")[0]
    results = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"\((benchmarks/[^)]+)\)", section)
    }
    dense, mixture = section.split("\nTwelve of the 48 layers")
    for part, name, count in ((dense, "step", 6), (mixture, "step_qwen3-moe", 5)):
        rows = [re.findall(r"\d+[.,][\d.,]*\d", row) for row in part.splitlines() if re.match(r"\| \w", row)]
        assert len(rows) == count
        found = results[f"benchmarks/results/{name}.md"].splitlines()
        for figures in rows:
            assert any(all(f" {figure} " in row for figure in figures) for row in found), figures
    for figure, name in (
        ("29.72", "longest_sequence"),
        ("28.5 / 25.9", "scaling_2_gpus_70b"),
        ("14.0 /", "scaling_one_gpu_70b"),
        ("1.095", "kernel_speed"),
        ("lora, 2 x 1, m = 16: 0.973", "scaling_2_gpus"),
    ):
        assert figure in results[f"benchmarks/results/{name}.md"], name
    off = [abs(float(share)) for share in re.findall(r"([+-][\d.]+)%", results["benchmarks/results/plan_memory.md"])]
    assert max(off) <= 1.3


def test_stable_names_exist() -> None:
    """And the other way round: what a package names is stable."""
    page = (DOCS / "stable-names.md").read_text(encoding="utf-8")
    listed = {
        package: re.findall(r"`(\w+)`", names)
        for package, names in re.findall(r"^\| `(lightning_pipelite[\w.]*)` \| (.*) \|$", page, re.MULTILINE)
    }
    for package, names in listed.items():
        module = importlib.import_module(package)
        assert all(hasattr(module, name) for name in names)
        assert sorted(names) == sorted(getattr(module, "__all__", names)), package
    rooms = {f"lightning_pipelite.{path.parent.name}" for path in (ROOT / "lightning_pipelite").glob("*/__init__.py")}
    named = {room for room in rooms if hasattr(importlib.import_module(room), "__all__")}
    assert named - {"lightning_pipelite.cli"} == listed.keys() - {"lightning_pipelite", "lightning_pipelite.errors"}
    (commands,) = re.findall(r"^`pipelite` with (.*?), their$", page, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([\w-]+)`", commands)) == {"fit", "validate", *COMMANDS}
