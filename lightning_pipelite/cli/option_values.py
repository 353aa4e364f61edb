"""The values of options that take one of a few words, read from the source files, and suggestions for wrong ones."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_CLASSES = {
    "model": ("lightning_pipelite.module.pipelite_module", "PipeLiteModule"),
    "data": ("lightning_pipelite.data.datamodule", "PackedDataModule"),
}
_NAMED_OTHERWISE = {
    "recompute": ("checkpoint", "checkpointing", "gradient_checkpointing", "full"),
    "varlen": ("flash_attention_2", "flash_attention_3", "flash_attn", "flash_attn_2", "flash"),
    "bfloat16": ("bf16", "bf16-true", "bf16-mixed", "fp16", "float16", "half", "16"),
    "float32": ("fp32", "32", "float", "32-true", "float64", "fp64", "double", "64"),
    "cosine": ("cosine_with_warmup", "cosine_annealing"),
    "constant": ("constant_with_warmup",),
    "best_fit": ("bfd", "best_fit_decreasing", "ffd"),
    "drop": ("truncate",),
}
"""Names of a value in other trainers."""


@functools.cache
def choices() -> dict[str, tuple[str | None, ...]]:
    """Return the dotted names of the model and data options that take one of a few words, with the words; None last."""
    found: dict[str, tuple[str | None, ...]] = {}
    for section, (module, name) in _CLASSES.items():
        tree = _tree(module)
        kind = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        init = next(node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        for argument in (*init.args.args, *init.args.kwonlyargs):
            words = _words(argument.annotation, tree)
            if words:
                found[f"{section}.{argument.arg}"] = words
    return found


def refused_value(name: str, value: str) -> str | None:
    """Return the message that refuses a value; None if the value is not known to be wrong.

    Args:
        name: Dotted name of the option.
        value: Its value as written.
    """
    known = choices().get(name)
    if known is None or value in (*known, "null", "Null", "NULL", "~", "None") or not re.fullmatch(r"[\w.+-]+", value):
        return None
    listed = ", ".join(repr(word) for word in known if word is not None) + " or null" * (None in known)
    return f"{name} must be one of {listed}, not {value}{proposed(value, filter(None, known))}"


def proposed(value: str, known: Iterable[str]) -> str:
    """Return the end of a message that refuses a value: a suggestion, or a full stop."""
    meant = meant_value(value, known)
    return "." if meant is None else f"; did you mean {meant}?"


def meant_value(value: str, known: Iterable[str]) -> str | None:
    """Return the known value that a wrong one most likely means; None if none is close."""
    known = [*known]
    lower = value.strip().lower()
    for own, others in _NAMED_OTHERWISE.items():
        if own in known and lower in others:
            return own
    near = difflib.get_close_matches(lower.replace("-", "_"), known, 1, cutoff=0.6)
    return near[0] if near else None


def _words(annotation: ast.expr | None, tree: ast.Module) -> tuple[str | None, ...]:
    """Return the words of a Literal or of an alias of one; empty if other values are possible."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        sides = [annotation.left, annotation.right]
        rest = [side for side in sides if not (isinstance(side, ast.Constant) and side.value is None)]
        inner_words = _words(rest[0], tree) if len(rest) == 1 else ()
        return (*inner_words, None) if inner_words else ()
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = annotation.slice
        values: Sequence[ast.expr] = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if annotation.value.id == "Literal" and all(isinstance(value, ast.Constant) for value in values):
            return tuple(str(value.value) for value in values)  # type: ignore[attr-defined]
    if isinstance(annotation, ast.Name):
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == annotation.id:
                return _words(node.value, tree)
            if isinstance(node, ast.ImportFrom) and any(alias.name == annotation.id for alias in node.names):
                ours = (node.module or "").startswith("lightning_pipelite.")
                return _words(annotation, _tree(node.module)) if ours and node.module else ()
    return ()


@functools.cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
