"""Which tests are fast, by how long each took when it last ran here; kept in pytest's cache."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

CALL, SETUP = 1.0, 5.0  # seconds, of a test itself and of the setup of fixtures shared by its file
KEY = "pipelite/seconds"


class Durations:
    """Records how long tests take, and deselects the slow ones under ``--fast``.

    A test that never ran here counts as fast the first time. The setup of what a file shares counts for each of its
    tests, as whichever runs first waits for it.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds: dict[str, dict[str, float]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not self._config.getoption("fast"):
            return
        slow = self.slow(item.nodeid for item in items)
        left_out = [item for item in items if item.nodeid in slow]
        self._config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in slow]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when in ("setup", "call"):
            self._seconds.setdefault(report.nodeid, {})[report.when] = round(report.duration, 2)

    def pytest_sessionfinish(self) -> None:
        # With several processes, the controller receives all reports. ``-p no:cacheprovider`` leaves no cache.
        if not hasattr(self._config, "workerinput") and self._cache is not None:
            self._cache.set(KEY, {**self._known(), **self._seconds})

    def slow(self, names: Iterable[str]) -> set[str]:
        """Return which of these tests are slow."""
        known = self._known()
        setups: dict[str, float] = {}
        for name, seconds in known.items():
            file = name.partition("::")[0]
            setups[file] = max(setups.get(file, 0.0), seconds.get("setup", 0.0))
        return {
            name
            for name in names
            if known.get(name, {}).get("call", 0.0) >= CALL or setups.get(name.partition("::")[0], 0.0) >= SETUP
        }

    @property
    def _cache(self) -> pytest.Cache | None:
        return getattr(self._config, "cache", None)

    def _known(self) -> dict[str, dict[str, float]]:
        return {} if self._cache is None else self._cache.get(KEY, {})
