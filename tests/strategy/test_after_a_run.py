"""After a run, the module is as before, with the trained weights, and the process holds nothing of the run."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import textwrap

import pytest
import torch

from after_jobs import (
    after_fit,
    device_memory_after_runs,
    layers_of_its_own_making,
    optimizers_of_the_run_before,
    run_the_example,
    runs,
    under_another_strategy,
    weights_after,
)
from lightning_pipelite import PipeLiteStrategy
from processes import Workers
from stage_jobs import trainer_for


@pytest.mark.parametrize(
    ("ends", "stages", "pieces"),
    [*((ends, stages, 1) for ends in ("ends", "error", "interrupt") for stages in (1, 2)), ("ends", 2, 2)],
)
def test_the_module_is_as_before(workers: Workers, ends: str, stages: int, pieces: int) -> None:
    results = workers.run(stages, after_fit, ends, stages, pieces)
    for result in results:
        assert result["names in the fit"]
        assert result["parameters in the fit"] == 0
        assert result["pickles in the fit"]
        assert result["copied in the fit"]
        assert result["names"]
        assert result["types"]
        assert result["attributes"] == []
        assert result["pickles"]
        assert result["copies"]
        assert result["draws"] == 3
    assert sorted(number for result in results for number in result["here"]) == [0, 2, 3, 4]
    modes = [mode for result in results for mode in result["modes"]]
    assert modes == ([False, True] if ends == "ends" else [True])
    told = [message for result in results for message in result["told"]]
    assert len(told) == (stages == 2)


def test_its_weights_are_those_of_lightnings_strategy(workers: Workers) -> None:
    ours, theirs = workers.run(1, weights_after, "pipelite")[0], workers.run(1, weights_after, "auto")[0]
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stages", [1, 2])
def test_layers_that_are_made_as_they_are_handed_out_stay(workers: Workers, stages: int) -> None:
    first, second = workers.run(stages, layers_of_its_own_making, stages)[0]
    assert second < first - 0.01


@pytest.mark.parametrize(("stages", "replicas", "pieces"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_runs_leave_nothing_open(workers: Workers, stages: int, replicas: int, pieces: int) -> None:
    for result in workers.run(stages * replicas, runs, stages, replicas, pieces):
        # Lightning's own process group stays open after each run; some threads may still be exiting.
        assert {groups for _, _, groups in result["opened"]} == {1}
        (threads, files, _), (threads_in_the_end, files_in_the_end, _) = result["opened"][0], result["opened"][-1]
        assert threads_in_the_end < threads + len(result["opened"]) / 2
        assert files_in_the_end < files + len(result["opened"]) / 2
        assert result["alive"] == 0


def test_the_optimizer_of_the_run_before_is_gone(workers: Workers) -> None:
    assert workers.run(1, optimizers_of_the_run_before)[0] == [False, False]


@pytest.mark.gpu
def test_runs_give_the_memory_of_the_gpu_back(workers: Workers) -> None:
    held = workers.run(1, device_memory_after_runs, "gpu")[0]
    assert held[-1] <= held[0]  # what libraries never free is allocated in the first run
    assert held[0] < 64 * 2**20


def test_other_strategies_and_groups_of_the_user_go_on(workers: Workers) -> None:
    opened, reduced = workers.run(1, under_another_strategy)[0]
    assert reduced == 1.0
    assert {groups for *_, groups in opened} == {2}


def test_the_example_of_the_strategy_runs(workers: Workers) -> None:
    doc = inspect.getdoc(PipeLiteStrategy) or ""
    found = re.search(r"Example::\n\n(.*?)\n\nArgs:", doc, re.DOTALL)
    assert found
    assert workers.run(3, run_the_example, textwrap.dedent(found[1])) == [4, 4, 4]


def test_a_trainer_can_be_pickled_and_copied() -> None:
    trainer = trainer_for(PipeLiteStrategy(2, timeout=7), 2)
    for again in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
        assert isinstance(again.strategy, PipeLiteStrategy)
        assert (again.strategy.pipeline_stages, again.strategy.timeout.total_seconds()) == (2, 7)
        assert again.strategy is not trainer.strategy
