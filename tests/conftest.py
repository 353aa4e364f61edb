"""What all tests share: worker processes that stay, one thread each, and no network.

Every test waits for what is imported here, so that it is next to nothing: torch alone takes two seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from processes import Workers

# Before anything imports torch, which takes its number of threads from there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Ranks over gloo: `workers.run(world_size, function, ...)`."""
    pool = Workers(4)
    yield pool
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes run the tests, and must give them the same names."""
    for item in items:
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: name the case, not where it lies in memory"
