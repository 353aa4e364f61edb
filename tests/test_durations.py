"""What `--fast` leaves out: tests that took long when they last ran."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from durations import KEY, Durations


class Cache(dict[str, Any]):
    """pytest's cache, in memory."""

    set = dict.__setitem__


def report(name: str, when: str, duration: float) -> Any:
    return SimpleNamespace(nodeid=name, when=when, duration=duration)


def test_slow_by_its_own_time_or_its_files_setup() -> None:
    config: Any = SimpleNamespace(cache=Cache())
    config.cache[KEY] = {"a.py::old": {"setup": 0.1, "call": 3.0}, "a.py::mended": {"call": 2.0}}
    run = Durations(config)
    for name, when, seconds in (
        ("a.py::mended", "call", 0.4), ("b.py::first", "setup", 7.0), ("b.py::first", "call", 0.1),
        ("a.py::mended", "teardown", 9.0),
    ):  # fmt: skip
        run.pytest_runtest_logreport(report(name, when, seconds))
    run.pytest_sessionfinish()
    names = ["a.py::old", "a.py::mended", "a.py::new", "b.py::first", "b.py::second"]
    assert Durations(config).slow(names) == {"a.py::old", "b.py::first", "b.py::second"}


def test_a_worker_of_xdist_writes_nothing() -> None:
    config: Any = SimpleNamespace(cache=Cache(), workerinput={})
    run = Durations(config)
    run.pytest_runtest_logreport(report("a.py::one", "call", 2.0))
    run.pytest_sessionfinish()
    assert KEY not in config.cache


@pytest.mark.parametrize("fast", [False, True])
def test_left_out_only_when_asked(fast: bool) -> None:
    told: list[Any] = []
    config: Any = SimpleNamespace(
        cache=Cache({KEY: {"a.py::old": {"call": 3.0}}}), getoption=lambda name: fast,
        hook=SimpleNamespace(pytest_deselected=lambda items: told.extend(items)),
    )  # fmt: skip
    items: Any = [SimpleNamespace(nodeid="a.py::old"), SimpleNamespace(nodeid="a.py::new")]
    both = [*items]
    Durations(config).pytest_collection_modifyitems(items)
    assert (items, told) == ((both[1:], both[:1]) if fast else (both, []))


def test_without_a_cache_nothing_is_known() -> None:
    config: Any = SimpleNamespace()
    run = Durations(config)
    run.pytest_runtest_logreport(report("a.py::one", "call", 2.0))
    run.pytest_sessionfinish()
    assert run.slow(["a.py::one"]) == set()
