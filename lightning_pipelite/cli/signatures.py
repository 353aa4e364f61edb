"""Parameters and their types, read from the source files: nothing long is imported for them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_PLAIN: dict[str, Any] = {each.__name__: each for each in (int, float, bool, str, list, dict)}
_GENERIC = ("Optional", "Union", "Literal", "list", "dict")


@dataclass(frozen=True)
class Signature:
    """What may be given.

    Attributes:
        types: Of each parameter; None where it is not read here.
        required: Those without a default.
        takes_others: Whether there are further ones, by ``*args`` or ``**kwargs``.
    """

    types: dict[str, Any]
    required: tuple[str, ...]
    takes_others: bool


@functools.cache
def signature_of(path: str) -> Signature | None:
    """Give the signature of a function, or of a class that has an ``__init__`` of its own; None for all others.

    Args:
        path: As of a class: ``package.module.name``; a package may have it from a module.
    """
    module, _, name = path.rpartition(".")
    found = _definition(module, name)
    if found is None:
        return None
    node, tree = found
    if isinstance(node, ast.ClassDef):
        made = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if len(made) != 1:
            return None
        node = made[0]
    given = node.args
    if given.posonlyargs:
        return None
    arguments = [*given.args[isinstance(found[0], ast.ClassDef) :], *given.kwonlyargs]
    types = {each.arg: _type_or_none(each.annotation, tree) for each in arguments}
    optional = [*[each.arg for each in given.args[len(given.args) - len(given.defaults) :]]]
    optional += [each.arg for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default]
    required = tuple(name for name in types if name not in optional)
    return Signature(types, required, takes_others=given.vararg is not None or given.kwarg is not None)


def _definition(module: str, name: str, depth: int = 5) -> tuple[ast.ClassDef | ast.FunctionDef, ast.Module] | None:
    """Find a class or a function in the source of its module, or of the one that this has it from."""
    tree = _tree(module)
    if tree is None or depth == 0:
        return None
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node, tree
    for origin, own in _imported(tree, module, name):
        return _definition(origin, own, depth - 1)
    return None


def _imported(tree: ast.Module, module: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the module that a name comes from, and its name there."""
    for node in ast.walk(tree):  # also what is imported for type checkers alone
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names if (alias.asname or alias.name) == name)


@functools.cache
def _tree(module: str) -> ast.Module | None:
    """Read a module's source; its packages are not imported, as finding a spec of it would."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or spec.origin is None or not spec.origin.endswith("__init__.py"):
        return None
    place = Path(spec.origin).parent.joinpath(*rest)
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


class _UnknownTypeError(Exception):
    """A type that is not read here."""


def _type_or_none(annotation: ast.expr | None, tree: ast.Module) -> Any:
    try:
        return _type(annotation, tree)
    except _UnknownTypeError:
        return None


def _type(node: ast.expr | None, tree: ast.Module) -> Any:
    """Evaluate an annotation of plain types."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # an annotation in quotes
        return _type(ast.parse(node.value, mode="eval").body, tree)
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    if isinstance(node, ast.Name) and node.id in _PLAIN:
        return _PLAIN[node.id]
    if isinstance(node, ast.Name):
        return _type(_alias(node.id, tree), tree)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _type(node.left, tree) | _type(node.right, tree)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _GENERIC:
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            if not all(isinstance(each, ast.Constant) for each in inner):
                raise _UnknownTypeError
            return Literal[tuple(each.value for each in inner)]  # type: ignore[attr-defined]
        kinds = [_type(each, tree) for each in inner]
        if node.value.id in ("Optional", "Union"):
            # Not typing's, which would give the first order of its types to all that ask for them in another.
            return functools.reduce(operator.or_, [*kinds, *[type(None)] * (node.value.id == "Optional")])
        return _PLAIN[node.value.id][tuple(kinds)]
    raise _UnknownTypeError


def _alias(name: str, tree: ast.Module) -> ast.expr:
    """Give what a name stands for in its module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise _UnknownTypeError
