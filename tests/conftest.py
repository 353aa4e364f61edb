"""What all tests share: persistent worker processes, one thread each, no network, and markers.

Every test waits for the imports here, so there are next to none: torch alone takes two seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from durations import Durations
from processes import Workers

# Set before anything imports torch, which reads its number of threads from here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out tests that took a second when they last ran here")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Durations(config))
    # A shell's background jobs ignore SIGINT, and children would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Provide ranks over gloo: `workers.run(world_size, function, ...)`."""
    pool = Workers(4)
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures and parameters, and skip those that need a GPU where there is none."""
    for item in items:
        # Several processes run the tests and must agree on their names.
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: give the case an id; this one contains a memory address"
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
    """Save the second that importing hypothesis for its summary takes, if no test has used it."""
    plugins = session.config.pluginmanager
    if "hypothesis" not in sys.modules and plugins.has_plugin("hypothesispytest"):
        plugins.unregister(name="hypothesispytest")


def parameters_of(item: pytest.Item) -> list[object]:
    """Return the values of a test's parameters."""
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
