"""What all tests share: worker processes that stay, one thread each, no network, and what markers are for.

Every test waits for what is imported here, so that it is next to nothing: torch alone takes two seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from durations import Durations
from processes import Workers

# Before anything imports torch, which takes its number of threads from there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out tests that took a second when they last ran here")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Durations(config))
    # As of what a shell runs in the background; children would inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Ranks over gloo: `workers.run(world_size, function, ...)`."""
    pool = Workers(4)
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is known by its fixtures and parameters, and skip what needs a GPU where there is none."""
    for item in items:
        # Several processes run the tests, and must give them the same names.
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: name the case, not where it lies in memory"
        if "workers" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.process)
        if "cuda" in map(str, parameters_of(item)):
            item.add_marker(pytest.mark.gpu)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Spare a run the second in which hypothesis is imported for its summary, where no test has used it."""
    plugins = session.config.pluginmanager
    if "hypothesis" not in sys.modules and plugins.has_plugin("hypothesispytest"):
        plugins.unregister(name="hypothesispytest")


def parameters_of(item: pytest.Item) -> list[object]:
    """The values of a test's parameters."""
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
