"""Checks whether transformers supports a model's config.json, without importing transformers."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.weight_files import read_json


def check_type(path: Path, *, trust_remote_code: bool) -> None:
    """Reject a configuration whose model type is unknown.

    Args:
        path: The model's config.json.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        ConfigurationError: The file is missing, names no type or an unknown one, or needs code of the model's own that
            is not trusted.
    """
    kind = type_of(path)
    if f'"{kind}"' in _sources():
        return
    if not trust_remote_code:
        refuse_own_code(path)
    if not _has_own_code(path):
        raise ConfigurationError(
            f"{path} is not supported by this version of transformers: its model_type is {kind}; correct it, or "
            "install a version of transformers that supports it."
        )


def type_of(path: Path) -> str:
    """Return the ``model_type`` of a config.json.

    Raises:
        ConfigurationError: The file is missing or has no ``model_type``.
    """
    kind = read_json(path).get("model_type")
    if not kind:
        raise ConfigurationError(f"{path} has no model_type; give the directory of a Hugging Face causal LM.")
    return str(kind)


def refuse_own_code(path: Path) -> None:
    """Reject a configuration that needs code of the model's own, for when such code is not trusted.

    Raises:
        ConfigurationError: It needs such code.
    """
    if _has_own_code(path):
        raise ConfigurationError(
            f"{path} requires the model's own code; set trust_remote_code to true if you trust who wrote it."
        )


def _has_own_code(path: Path) -> bool:
    return "auto_map" in read_json(path)


@functools.cache
def _sources() -> str:
    """Return the source of transformers' auto-class tables: a type that does not appear in it is unknown."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    files = sorted((Path(spec.origin).parent / "models" / "auto").glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
