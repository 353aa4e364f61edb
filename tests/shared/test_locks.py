"""A directory being written is never taken for a killed process's leftovers, however many processes write at once."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from lightning_pipelite.checkpoint.directory import PartialDirectory

PROCESSES, PUBLISHES = 4, 80


def _publish(parent: Path, number: int, answer: Connection) -> None:
    try:
        for turn in range(PUBLISHES):
            # Half of them under one name, which every process replaces.
            partial = PartialDirectory(parent / ("last" if turn % 2 else f"{number}-{turn}"))
            try:
                (partial.path / "file").write_text(f"{number} {turn}")
                partial.publish()
            finally:
                partial.close()
        answer.send("")
    except BaseException:
        answer.send(traceback.format_exc())


def test_many_publish_beside_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = []
    for number in range(PROCESSES):
        ours, theirs = context.Pipe()
        process = context.Process(target=_publish, args=(tmp_path, number, theirs))
        process.start()
        running.append((process, ours))
    said = [ours.recv() for _, ours in running]
    for process, _ in running:
        process.join()
    assert said == [""] * PROCESSES
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == sorted(["last", *(f"{n}-{turn}" for n in range(PROCESSES) for turn in range(0, PUBLISHES, 2))])
    assert all((tmp_path / name / "file").read_text() for name in found)
