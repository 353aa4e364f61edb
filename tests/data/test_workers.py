"""Parallel processes return batches in order, with only a few in memory, and leave no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lightning_pipelite.data.workers import map_in_order
from lightning_pipelite.errors import ConfigurationError

pytestmark = pytest.mark.process


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.01 if number % 3 else 0.03)  # later ones may finish earlier
    return number * number, os.getpid()


@pytest.fixture
def none_left() -> Iterator[None]:
    """No child process is left, except for those that existed before, such as the suite's workers."""
    before = psutil.Process().children()
    yield
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.usefixtures("none_left")
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_results_in_order(count: int) -> None:
    results = list(map_in_order(slow_square, range(count)))
    assert [square for square, _ in results] == [number * number for number in range(count)]
    processes = {process for _, process in results}
    if count < 5:
        assert processes <= {os.getpid()}
    elif len(os.sched_getaffinity(0)) > 1:
        assert len(processes - {os.getpid()}) > 1


def test_few_batches_are_under_way() -> None:
    read = 0

    def batches() -> Iterator[int]:
        nonlocal read
        for number in range(60):
            read = number
            yield number

    most = 0
    for done, _ in enumerate(map_in_order(slow_square, batches())):
        most = max(most, read - done)
    assert most <= 2 * len(os.sched_getaffinity(0)) + 5


def refuse_seven(number: int) -> int:
    if number == 7:
        raise ConfigurationError("seven: give another number.")
    return number


@pytest.mark.usefixtures("none_left")
def test_an_error_in_a_process_is_that_error() -> None:
    with pytest.raises(ConfigurationError, match=r"seven: give another number\."):
        list(map_in_order(refuse_seven, range(30)))


def die_at_seven(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs processes")
def test_a_killed_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="A tokenisation worker process was killed"):
        list(map_in_order(die_at_seven, range(30)))


def endless(folder: Path) -> None:
    def mark(number: int) -> None:
        (folder / str(os.getpid())).touch()
        time.sleep(0.01)

    list(map_in_order(mark, range(10**6)))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs processes")
def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=endless, args=(tmp_path,))
    process.start()
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while alive := [path.name for path in tmp_path.iterdir() if psutil.pid_exists(int(path.name))]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)
