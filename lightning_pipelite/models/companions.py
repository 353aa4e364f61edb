"""What a model's directory holds beside configuration and weights: tokenizer, templates, code of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_pipelite.models.transformers_compat import get_relative_imports
from lightning_pipelite.models.weight_files import INDEX_FILE, PICKLED_INDEX_FILE

PLAIN = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
FOLDERS = ("additional_chat_templates", "custom_generate")  # that transformers looks for by these names
WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


def own_code(model_dir: Path) -> list[Path]:
    """Return the Python files that ``auto_map`` names in a JSON file of ``model_dir``, and what those import of it.

    Of configuration, model, tokenizer, processor. Code of another repository ("other/repo--file.Class") is none of
    them: transformers loads it from there, wherever the model lies.

    Returns:
        Paths relative to ``model_dir``, sorted.
    """
    found: set[Path] = set()
    for path in sorted(model_dir.glob("*.json")):
        todo = [model_dir / f"{reference.rpartition('.')[0]}.py" for reference in _references(_auto_map(path))]
        while todo:
            file = todo.pop()
            if file.is_file() and file not in found:  # what is missing is missing to the model as well
                found.add(file)
                todo += [file.parent / f"{name}.py" for name in get_relative_imports(file)]
    return sorted(file.relative_to(model_dir) for file in found)


def companions(model_dir: Path) -> list[Path]:
    """Return what a model that is saved anew needs of ``model_dir`` beside configuration and weights.

    Code of a model's own may read files of any name: all are taken then.

    Returns:
        Files and folders, relative to ``model_dir``, sorted.
    """
    paths = {path for pattern in PLAIN for path in model_dir.glob(pattern)}
    if code := own_code(model_dir):
        paths |= set(everything_else(model_dir)) | {model_dir / each for each in code}
    rewritten = ("config.json", INDEX_FILE, PICKLED_INDEX_FILE)
    return sorted(path.relative_to(model_dir) for path in paths if path.name not in rewritten)


def everything_else(model_dir: Path) -> list[Path]:
    """Return all that lies in ``model_dir`` but weights and what is hidden."""
    return [
        path
        for path in sorted(model_dir.iterdir())
        if not path.name.startswith(".")
        and ((path.is_file() and path.suffix not in WEIGHT_FILES) or (path.is_dir() and path.name in FOLDERS))
    ]


def copy_to(target: Path, model_dir: Path, paths: list[Path]) -> None:
    """Copy files and folders, given relative to ``model_dir``, to the same places in ``target``."""
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (model_dir / path).is_dir() else shutil.copyfile)(model_dir / path, target / path)


def _auto_map(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever needs the file says so
        return None
    return content.get("auto_map") if isinstance(content, dict) else None


def _references(auto_map: Any) -> Iterator[str]:
    """Yield the classes "file.Class" in the model's own directory; a tokenizer has two, of which one may be null."""
    if isinstance(auto_map, str) and "." in auto_map and "--" not in auto_map:
        yield auto_map
    elif isinstance(auto_map, (dict, list)):
        for each in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(each)
