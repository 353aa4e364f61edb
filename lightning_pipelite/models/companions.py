"""The files of a model directory besides configuration and weights: tokenizer, templates, custom code."""

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
FOLDERS = ("additional_chat_templates", "custom_generate")  # names that transformers looks for
WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


def own_code(model_dir: Path) -> list[Path]:
    """Return the Python files that ``auto_map`` names in a JSON file of ``model_dir``, and the files they import.

    Covers configuration, model, tokenizer and processor. Code of another repository ("other/repo--file.Class") is
    excluded: transformers loads it from there, wherever the model is.

    Returns:
        Paths relative to ``model_dir``, sorted.
    """
    found: set[Path] = set()
    for path in sorted(model_dir.glob("*.json")):
        todo = [model_dir / f"{reference.rpartition('.')[0]}.py" for reference in _references(_auto_map(path))]
        while todo:
            file = todo.pop()
            if file.is_file() and file not in found:  # a file missing here is missing for the model too
                found.add(file)
                todo += [file.parent / f"{name}.py" for name in get_relative_imports(file)]
    return sorted(file.relative_to(model_dir) for file in found)


def companions(model_dir: Path) -> list[Path]:
    """Return what a newly saved copy of a model needs from ``model_dir`` besides configuration and weights.

    Custom code may read files of any name, so for a model that has some, everything is included.

    Returns:
        Files and folders, relative to ``model_dir``, sorted.
    """
    paths = {path for pattern in PLAIN for path in model_dir.glob(pattern)}
    if code := own_code(model_dir):
        paths |= set(everything_else(model_dir)) | {model_dir / each for each in code}
    rewritten = ("config.json", INDEX_FILE, PICKLED_INDEX_FILE)
    return sorted(path.relative_to(model_dir) for path in paths if path.name not in rewritten)


def everything_else(model_dir: Path) -> list[Path]:
    """Return the files of ``model_dir`` that are neither weights nor hidden, and the folders in ``FOLDERS``."""
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
    except (OSError, ValueError):  # reported by the code that needs the file
        return None
    return content.get("auto_map") if isinstance(content, dict) else None


def _references(auto_map: Any) -> Iterator[str]:
    """Yield the classes "file.Class" in the model's own directory; a tokenizer has two, one of which may be null."""
    if isinstance(auto_map, str) and "." in auto_map and "--" not in auto_map:
        yield auto_map
    elif isinstance(auto_map, (dict, list)):
        for each in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(each)
