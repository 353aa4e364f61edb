"""Names that begin with an underscore are private to their file: no other file of the package reads or changes them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("lightning_pipelite/**/*.py")) + sorted(ROOT.glob("kernels/*.py"))
# Libraries' names that are also bound in this package.
OF_LIBRARIES = {"_apply", "_attn_implementation", "_groups", "_replace", "_timeout"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def bound(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file binds: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:  # as in vars(it).update(_name=...)
            yield node.arg


def is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the names that a file reads from elsewhere, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_own(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_pipelite"):
            yield from ((node.lineno, alias.name) for alias in node.names)


def test_no_file_touches_the_private_names_of_another() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    owners = defaultdict(set)
    for path, tree in trees.items():
        for name in filter(is_private, bound(tree)):
            owners[name].add(path)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name} of {', '.join(str(o.relative_to(ROOT)) for o in owners[name])}"
        for path, tree in trees.items()
        for line, name in reads(tree)
        if is_private(name) and name not in OF_LIBRARIES and owners[name] and path not in owners[name]
    ]
    assert found == []
