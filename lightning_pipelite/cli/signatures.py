"""Parameters and their types, read from the source files without slow imports."""

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
    """The parameters of a function or class.

    Attributes:
        types: Type of each parameter by name; None if it is not read here.
        required: Names of the parameters without a default.
        takes_others: Whether it takes further ones through ``*args`` or ``**kwargs``.
    """

    types: dict[str, Any]
    required: tuple[str, ...]
    takes_others: bool


@functools.cache
def signature_of(path: str) -> Signature | None:
    """Return the signature of a function, or of a class with an ``__init__`` of its own; None for anything else.

    Args:
        path: Import path, ``package.module.name``; a package may re-export the name from a module.
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
    """Find a class or a function in the source of its module, or of the module that this one imports it from."""
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
    """Yield the module that a name is imported from, and its name there."""
    for node in ast.walk(tree):  # includes imports under TYPE_CHECKING
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names if (alias.asname or alias.name) == name)


@functools.cache
def _tree(module: str) -> ast.Module | None:
    """Parse a module's source without importing its packages, as ``find_spec`` of the module would."""
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
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
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
            # Not typing's, whose cache may return an equal union with its types in another order.
            return functools.reduce(operator.or_, [*kinds, *[type(None)] * (node.value.id == "Optional")])
        return _PLAIN[node.value.id][tuple(kinds)]
    raise _UnknownTypeError


def _alias(name: str, tree: ast.Module) -> ast.expr:
    """Return the value assigned to a name in its module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise _UnknownTypeError
