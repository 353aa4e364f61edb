"""Tests never import benchmarks; what both need is in tests/support, where benchmarks can import it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
BENCHMARKS = sorted((TESTS.parent / "benchmarks").glob("*.py"))
SUPPORT = {path.stem for path in (TESTS / "support").glob("*.py")}


def imported(path: Path) -> list[str]:
    """Return the modules that a file imports, in order, including imports within functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = []
    for node in sorted(nodes, key=lambda node: node.lineno):
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return names


def test_no_test_imports_a_benchmark() -> None:
    benchmarks = {path.stem for path in BENCHMARKS}
    assert not benchmarks & SUPPORT, "two modules of one name"
    found = {path.name: taken for path in TESTS.rglob("*.py") if (taken := benchmarks & set(imported(path)))}
    assert found == {}


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_find_what_they_share_with_the_tests(benchmark: Path) -> None:
    names = imported(benchmark)
    if shared := SUPPORT & set(names):
        assert names.index("tests_support") < min(names.index(name) for name in shared)
