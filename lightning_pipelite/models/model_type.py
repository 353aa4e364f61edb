"""Whether transformers knows a model by its config.json, read without importing transformers."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.weight_files import read_json


def check_type(path: Path, *, trust_remote_code: bool) -> None:
    """Refuse a configuration of a type that nobody knows.

    Args:
        path: The model's config.json.
        trust_remote_code: Whether its own code may be run.

    Raises:
        ConfigurationError: It is not there, says no type, or one that is neither transformers' nor of the model's code.
    """
    kind = type_of(path)
    if f'"{kind}"' in _sources():
        return
    if not trust_remote_code:
        refuse_own_code(path)
    if not _has_own_code(path):
        raise ConfigurationError(
            f"{path} is no configuration that this version of transformers knows: its model_type is {kind}; correct "
            "it, or install a version of transformers that has it."
        )


def type_of(path: Path) -> str:
    """Return the type that a config.json says.

    Raises:
        ConfigurationError: It is not there, or says none.
    """
    kind = read_json(path).get("model_type")
    if not kind:
        raise ConfigurationError(f"{path} has no model_type; give the directory of a Hugging Face causal LM.")
    return str(kind)


def refuse_own_code(path: Path) -> None:
    """Refuse a configuration that needs code which nobody has said to trust.

    Raises:
        ConfigurationError: It does.
    """
    if _has_own_code(path):
        raise ConfigurationError(
            f"{path} asks for code of the model's own; set trust_remote_code to true if you trust who wrote it."
        )


def _has_own_code(path: Path) -> bool:
    return "auto_map" in read_json(path)


@functools.cache
def _sources() -> str:
    """Return the source text of transformers' tables of types: what is nowhere in them is no type."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    files = sorted((Path(spec.origin).parent / "models" / "auto").glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
