"""mkdocs hooks that make pages of results, examples and commands, and redirect links from docs/ to them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from lightning_pipelite.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
STATED = ("torch", "lightning", "deepspeed", "transformers", "peft", "bitsandbytes")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".ipynb": "python"}
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file in benchmarks/results, examples/ and configs/."""
    for path in sorted(RESULTS.glob("*.md")):
        text = f"# {path.stem}\n\n{path.read_text(encoding='utf-8')}"
        files.append(File.generated(config, f"results/{path.name}", content=text))
    for path in examples():
        shown = path.read_text(encoding="utf-8")
        text = cells(shown) if path.suffix == ".ipynb" else f"# {path.name}\n\n{fenced(shown, LANGUAGES[path.suffix])}"
        files.append(File.generated(config, f"examples/{path.name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the lists, and redirect links to files outside docs/ to the pages made from them."""
    markdown = markdown.replace("<!-- commands -->", commands())
    markdown = markdown.replace("<!-- results -->", results()).replace("<!-- versions -->", versions())
    markdown = re.sub(r"\]\(\.\./benchmarks/results/([\w-]+)\.md\)", r"](results/\1.md)", markdown)
    return re.sub(r"\]\(\.\./((?:examples|configs)/[\w.]+)\)", _example, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Convert reStructuredText roles and literal blocks, which the docstrings use as Lightning's do."""
    html = re.sub(r":(?:class|mod|func|meth|attr):<code>~?([\w.]+)</code>", _last_name, html)
    return re.sub(r"<p>Example::</p>", "<p>Example:</p>", html)


def _last_name(match: re.Match[str]) -> str:
    return f"<code>{match[1].rpartition('.')[2]}</code>"


def _example(match: re.Match[str]) -> str:
    return f"](examples/{Path(match[1]).name}.md)"


def examples() -> list[Path]:
    """Return the files that get a page: examples and configurations."""
    return sorted(
        path for folder in ("examples", "configs") for path in (ROOT / folder).iterdir() if path.suffix in LANGUAGES
    )


def cells(notebook: str) -> str:
    """Return the cells of a notebook as Markdown."""
    shown = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        shown.append(source if cell["cell_type"] == "markdown" else fenced(source + "\n", "python"))
    return "\n\n".join(shown)


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}```\n"


def commands() -> str:
    """Return a section for each command, made from the docstring of its function."""
    return "\n".join(
        f"## pipelite {name}\n\n::: {each.module}.{each.function}\n    options:\n"
        "      show_root_heading: false\n      show_root_toc_entry: false\n"
        for name, each in COMMANDS.items()
    )


def results() -> str:
    """Return a table of the results: what each shows, from its program's docstring, and what it was measured on."""
    lines = ["| result | what it shows | measured on |", "| --- | --- | --- |"]
    for path in sorted(RESULTS.glob("*.md")):
        command, _, measured = path.read_text(encoding="utf-8").splitlines()[:3]
        program = next(word for word in command.strip("`").split() if word.endswith(".py"))
        shows = (ast.get_docstring(ast.parse((ROOT / program).read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        lines.append(f"| [{path.stem}](results/{path.name}) | {' '.join(shows.split())} | {measured.split(';')[0]} |")
    return "\n".join(lines)


def versions() -> str:
    """Return table rows of the lowest and newest tested versions, from the constraints files."""
    lowest, newest = (pins(ROOT / name) for name in ("constraints-lowest.txt", "constraints.txt"))
    return "\n".join(f"| {name} | {lowest[name]} | {newest[name]} |" for name in STATED)


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))
