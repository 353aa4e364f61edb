"""Options of the Trainer mean the same under the strategy as under DDP: steps, hooks, logs, files, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from processes import Workers
from trainer_jobs import run_rows
from trainer_recorder import Event
from trainer_rows import NOT_CALLED, ONCE_A_NODE, REHEARSED, ROWS

Layout = tuple[int | None, int]  # stages (None: DDP) and replicas
CASES = [
    pytest.param(name, (stages, replicas), id=f"{name}-{stages}x{replicas}")
    for name, row in ROWS.items()
    for stages, replicas in ((1, 1), (2, 1), *([(1, 2)] if row.replicas > 1 else []))
]
AT_ONCE = 20  # rows that share a process group


@pytest.fixture(scope="module")
def table(
    request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, dict[str, list[Any]]]:
    """What each rank recorded, for the rows that the selected tests need."""
    asked: dict[Layout, list[str]] = {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == test_as_ddp_does.__name__:
            name, (stages, replicas) = item.callspec.params["name"], item.callspec.params["layout"]
            for layout in ((stages, replicas), (None, replicas)):
                names = asked.setdefault(layout, [])
                names += [name] if name not in names else []
    folder = str(tmp_path_factory.mktemp("rows"))
    found: dict[Layout, dict[str, list[Any]]] = {}
    for (stages, replicas), names in asked.items():
        rows = found[stages, replicas] = {}
        for start in range(0, len(names), AT_ONCE):
            some, ranks = names[start : start + AT_ONCE], (stages or 1) * replicas
            results = workers.run(ranks, run_rows, some, folder, stages, ranks)
            rows |= {name: [rank[name] for rank in results] for name in some}
    return found


@pytest.mark.timeout(900)  # the first one runs all rows
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_as_ddp_does(table: Any, name: str, layout: Layout) -> None:
    _, replicas = layout
    ddp, pipeline = table[None, replicas][name], table[layout][name]
    if ROWS[name].refused and len(pipeline) > 1:
        assert all(ROWS[name].refused in ours.get("error", "") for ours in pipeline)
        return
    for rank, ours in enumerate(pipeline):
        compare(ours, ddp[rank % replicas], ROWS[name].differs)
        assert not {each[1] for part in ours["parts"] for each in part["events"]} & set(NOT_CALLED)
    for parts in zip(*(each["parts"] for each in (ddp[0], *pipeline)), strict=True):
        reference, *ranks = (part["weights"].keys() for part in parts)
        assert set().union(*ranks) == set(reference)


def test_what_differs_is_seen(workers: Workers, tmp_path: Path) -> None:
    """The comparison distinguishes rows that differ in a single option."""
    names = ["max_epochs", "num_sanity_val_steps 0", "num_sanity_val_steps -1", "clip by value", "a rate by epoch"]
    found = workers.run(1, run_rows, names, str(tmp_path), None, 1)[0]
    for name in names:
        compare(found[name], found[name], ())
        for other in names:
            if other != name:
                with pytest.raises(AssertionError):
                    compare(found[name], found[other], ())


def compare(ours: Any, theirs: Any, moved: tuple[str, ...]) -> None:
    """Compare a rank with the DDP rank that had the same data; ``moved`` are hooks that are called elsewhere."""
    for each in (theirs, ours):
        assert "error" not in each, each["error"]
    assert ours["files"] in (theirs["files"], None)
    for mine, reference in zip(ours["parts"], theirs["parts"], strict=True):
        assert mine["state"] == reference["state"]
        events, expected = (without_rehearsal(part["events"]) for part in (mine, reference))
        assert in_place(events, moved) == in_place(expected, moved)
        for what in moved:
            assert [each[1] for each in events].count(what) >= [each[1] for each in expected].count(what), what
        for kind in ("lines", "metrics", "callbacks", "results"):
            close(mine[kind], reference[kind], kind)
        for parameter, weight in mine["weights"].items():
            torch.testing.assert_close(weight, reference["weights"][parameter], atol=1e-6, rtol=1e-5)


def in_place(events: list[Event], moved: tuple[str, ...]) -> list[Event]:
    """Return the events that must come in the same order, at the same place."""
    return [each for each in events if each[1] not in (*NOT_CALLED, *ONCE_A_NODE, *moved)]


def without_rehearsal(events: list[Event]) -> list[Event]:
    start = next((i for i, each in enumerate(events) if each[:2] == ("module", "on_train_start")), len(events)) + 1
    end = next((i for i in range(start, len(events)) if events[i][1] not in REHEARSED), start)
    return events[:start] + events[end:]


def close(mine: Any, reference: Any, where: str) -> None:
    """Require equality, of floats up to rounding."""
    if isinstance(reference, dict):
        assert mine.keys() == reference.keys(), where
        for key, value in reference.items():
            close(mine[key], value, f"{where}.{key}")
    elif isinstance(reference, (list, tuple)):
        assert len(mine) == len(reference), where
        for index, (a, b) in enumerate(zip(mine, reference, strict=True)):
            close(a, b, f"{where}[{index}]")
    else:
        expected = pytest.approx(reference, abs=1e-6, nan_ok=True) if isinstance(reference, float) else reference
        assert mine == expected, where
