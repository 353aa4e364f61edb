"""The documentation is correct: links resolve, pictures match their code, and the table of old keys is true."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipelite.cli.base_name import with_own_names
from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.early import check_command, check_early
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
    "lora_weight_decay": "3.5", "max_checkpoints": "5",
}  # fmt: skip
CONVERTED = {"lora_weight_decay": ("weight_decay", 3.5), "evals_per_run": ("evals_per_epoch", 3)}
"""Options of callbacks with another name or value here: 4 evaluations are one before training and 3 in its epoch."""
SWITCHES = {"load_in_4bit", "use_control_adapters", "full_fine_tune", "use_column_major_topology", "drop_tails"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """Covers links within the repository; `make docs` checks those of the site, with their anchors."""
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
    # Glyphs and coordinates depend on matplotlib; the texts, kept as comments, and the number of groups do not.
    kept = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    drawn = output.read_text(encoding="utf-8")
    assert re.findall(r"<!--(.*?)-->", drawn) == re.findall(r"<!--(.*?)-->", kept)
    assert drawn.count("<g id=") == kept.count("<g id=")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?:^|`)pipelite (?!checkpoint`)([a-z][a-z-]*)([^`\n]*)", text, re.MULTILINE):
        if name in ("fit", "validate", "plan"):
            rest = re.sub(r"(?<=--config )(FILE|new\.yaml)", "configs/lora.yaml", rest)
            words = with_own_names(name, shlex.split(rest, comments=True))
            if name == "plan" and words:
                check_command(name, COMMANDS[name], words)
            elif name != "plan":
                check_early([*words, "--print_config"])  # which requires no model
            continue
        command = COMMANDS[name]
        known = inspect.signature(getattr(importlib.import_module(command.module), command.function)).parameters
        words = with_own_names(name, re.findall(r"--\w+", rest))
        assert {word[2:] for word in words} <= set(known), f"pipelite {name}{rest}"


def test_python_blocks_compile_and_import() -> None:
    """Names that they import from this package must exist; tests/test_readme.py runs the README's blocks."""
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


def named(path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def options_of(path: str) -> set[str]:
    """Return the options that the reference of a class or a function must have."""
    parameters = inspect.signature(named(path)).parameters
    inner = {"accelerator", "parallel_devices"}  # Lightning passes these to every strategy
    return {name for name, each in parameters.items() if each.kind != each.VAR_KEYWORD} - inner


def test_every_option_has_its_words() -> None:
    """The reference describes an option by its entry in the docstring."""
    for name in [*REFERENCE, *(f"{command.module}.{command.function}" for command in COMMANDS.values())]:
        said = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.getdoc(named(name)) or "", re.MULTILINE)
        assert set(re.findall(r"^    (\w+):", said[1], re.MULTILINE) if said else []) == options_of(name), name


@pytest.mark.parametrize("package", ["callbacks", "adapters"])
def test_the_reference_has_what_is_public(package: str) -> None:
    public = set(importlib.import_module(f"lightning_pipelite.{package}").__all__) - {"Adapter"}  # the base class
    assert public <= {name.rpartition(".")[2] for name in REFERENCE}


def test_the_configuration_of_checkpoints_has_options_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line accepts it on top of a shipped one; tests/optim and test_readme cover the other pages."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "checkpoints.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "block.yaml").write_text(block)
    files = [f"--config={ROOT / 'configs' / 'lora.yaml'}", f"--config={tmp_path / 'block.yaml'}"]
    monkeypatch.setattr(sys, "argv", ["pipelite", "fit", *files, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err


def old(key: str) -> str:
    """Return a qlora-pipe-lite configuration in which this key differs from its default."""
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
    text = Migration(tmp_path / "old.toml").yaml()
    content = yaml.safe_load(text)
    if here.startswith("none"):
        assert f"# {key} was " in text
        return
    place = re.match(r"`([\w.]+)`", here)
    assert place
    found: Any = content
    for part in place[1].split("."):
        found = found[part]
    given = tomllib.loads((tmp_path / "old.toml").read_text())[key]
    if ":" not in here:
        assert found == given
        return
    options = {
        each["class_path"].rpartition(".")[2]: each.get("init_args", {})
        for each in (found if isinstance(found, list) else [found])
    }
    if option := re.search(r": `(\w+)`$", here):
        (only,) = options.values()
        assert only[option[1]] == given
    elif key == "output_dir":
        assert options["TimedCheckpoint"]["dirpath"] == f"{given}/checkpoints"
        assert options["SaveTrained"]["output_dir"] == f"{given}/trained"
        assert content["trainer"]["logger"]["init_args"]["save_dir"] == given
    else:
        kind = re.search(r": (\w+)", here)
        assert kind
        assert kind[1] in options
        if key not in SWITCHES:
            name, value = CONVERTED.get(key, (key, given))
            assert options[kind[1]][name] == value


def test_the_table_has_every_old_key() -> None:
    source = (ROOT / "lightning_pipelite" / "export" / "migration.py").read_text(encoding="utf-8")
    known = set(re.findall(r'_take\("(\w+)"', source)) | set(re.findall(r'for key, default in \(\("(\w+)"', source))
    assert known <= {key for key, _ in ROWS}


def make_docs(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command of `make docs` with another output directory."""
    recipe = re.search(
        r"^docs:.*\n\t\$\(BIN\)/mkdocs (.*) --site-dir site$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert recipe
    command = [sys.executable, "-m", "mkdocs", *recipe[1].split(), "--site-dir", str(site), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """As by `make docs`: there are no warnings, all links and anchors resolve, and the reference lists all options."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    done = make_docs(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "reference").glob("*/index.html"))
    sections = dict(re.findall(r'<h2 id="([\w.-]+)"(.*?)(?=<h2|$)', pages, re.DOTALL))
    shown = {name: name for name in REFERENCE}
    shown |= {f"pipelite-{name}": f"{each.module}.{each.function}" for name, each in COMMANDS.items()}
    for heading, name in shown.items():
        assert set(re.findall(r"<b><code>(\w+)</code></b>", sections[heading])) == options_of(name), name


@pytest.mark.parametrize("link", ["", "gone.md", "index.md#gone", "gone.png"])
def test_a_link_that_leads_nowhere_fails_the_build(link: str, tmp_path: Path) -> None:
    """Builds a one-page site with this site's settings."""
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Here\n\n[there]({link or '#here'})\n")
    ours = {"docs_dir": "docs", "nav": [{"Here": "index.md"}], "theme": {"name": "mkdocs"}, "plugins": [], "hooks": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"INHERIT": str(ROOT / "mkdocs.yml"), **ours, "extra_css": []}))
    done = make_docs(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == (1 if link else 0), done.stdout + done.stderr


def test_figures_of_the_readme_are_in_the_results() -> None:
    """A row of the tables is in one row of the benchmark's results; further figures are in results that are linked."""
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
            assert figures
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
    """Listed names exist, and every name that a package exports is listed."""
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


def test_quoted_messages_are_those_of_the_program() -> None:
    """The symptoms that troubleshooting quotes can be searched for."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| ")]
    quotes = [quote for cell in symptoms for quote in cell.split("`")[1::2] if " " in quote and "--" not in quote]
    quotes = [quote for quote in quotes if not quote.startswith("pipelite:")]  # in tests/strategy/test_failures.py
    assert len(quotes) > 7
    messages = set()
    for path in ROOT.glob("lightning_pipelite/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                messages.add("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.add(node.value)
    for quote in quotes:
        fixed = [part.strip(" ?:()") for part in re.split(r"\w*=?\.\.\.", quote)]
        assert max(map(len, fixed)) > 8, quote
        assert all(any(part in message for message in messages) for part in fixed), quote
