"""The interleaved schedule has its published efficiency and limits, and none of its orders deadlocks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.schedule import Action, Schedule
from lightning_pipelite.strategy.timeline import simulate

# The efficiency is m V / (m V + p - 1) for m a multiple of p, if all pieces take equally long and transfers take no
# time: Narayanan et al., 2021 (arXiv 2104.04473), section 2.3.
KNOWN = [(2, 4), (4, 4), (4, 8), (4, 16), (8, 16)]


@pytest.mark.parametrize(("ranks", "micro_batches"), KNOWN)
@pytest.mark.parametrize("virtual_stages", [1, 2, 4])
def test_equal_pieces_idle_for_the_known_share(ranks: int, micro_batches: int, virtual_stages: int) -> None:
    schedule = interleaved_1f1b(ranks, virtual_stages, micro_batches)
    pieces = ranks * virtual_stages
    step = simulate(schedule, [1.0] * pieces, [2.0] * pieces)
    work = micro_batches * virtual_stages
    assert step.efficiency == pytest.approx(work / (work + ranks - 1))
    assert step.busy == (3.0 * work,) * ranks


@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 5), (4, 6), (4, 7), (3, 5), (2, 3), (4, 9), (8, 12)])
@pytest.mark.parametrize("virtual_stages", [1, 2, 3, 4])
def test_a_number_that_is_no_multiple_of_the_ranks_loses_no_more(
    ranks: int, micro_batches: int, virtual_stages: int
) -> None:
    pieces = ranks * virtual_stages
    step = simulate(interleaved_1f1b(ranks, virtual_stages, micro_batches), [1.0] * pieces, [2.0] * pieces)
    work = micro_batches * virtual_stages
    assert step.efficiency == pytest.approx(work / (work + ranks - 1))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 1), (2, 5), (4, 2), (4, 8), (5, 7)])
def test_one_piece_a_rank_is_deepspeeds_1f1b(ranks: int, micro_batches: int) -> None:
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    schedule = interleaved_1f1b(ranks, 1, micro_batches)
    for rank in range(ranks):
        passes = [
            instruction.name == "BackwardPass"
            for step in TrainSchedule(micro_batches, ranks, rank)
            for instruction in step
            if instruction.name in ("ForwardPass", "BackwardPass")
        ]
        assert [action.backward for action in schedule.orders[rank]] == passes


def test_all_combinations_run_to_their_end() -> None:
    for ranks, virtual_stages, micro_batches in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 3, 5, 8, 13)):
        if micro_batches * virtual_stages * ranks > 200:
            continue
        for training, ahead in itertools.product((True, False), (0, 1)):
            interleaved_1f1b(ranks, virtual_stages, micro_batches, training).check(ahead)


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(1, 12), virtual_stages=st.integers(1, 6), micro_batches=st.integers(1, 24))
def test_activations_in_flight_are_bounded(ranks: int, virtual_stages: int, micro_batches: int) -> None:
    pieces = ranks * virtual_stages
    step = simulate(interleaved_1f1b(ranks, virtual_stages, micro_batches), [1.0] * pieces, [2.0] * pieces)
    group = max(min(ranks, micro_batches), -(-micro_batches // max(1, micro_batches // ranks)))
    for rank, in_flight in enumerate(step.in_flight):
        limit = ranks - rank if virtual_stages == 1 else 2 * (ranks - rank - 1) + (virtual_stages - 1) * group + 1
        assert in_flight <= min(limit, micro_batches * virtual_stages)


def test_inputs_are_received_before_the_pass_before() -> None:
    schedule = interleaved_1f1b(4, 2, 8)
    for rank in range(4):
        program = schedule.program(rank)
        computes = [i.action for i in program if i.name == "compute"]
        assert computes == list(schedule.orders[rank])
        for action, before in zip(computes[1:], computes, strict=False):
            if schedule.comes_from_afar(action):
                received = next(n for n, i in enumerate(program) if i.name == "receive" and i.action == action)
                assert received < next(n for n, i in enumerate(program) if i.name == "compute" and i.action == before)


def test_hidden_transfers_cost_less_than_their_time() -> None:
    schedule = interleaved_1f1b(4, 2, 8)
    at_once, late = (simulate(schedule, [1.0] * 8, [2.0] * 8, transfer).seconds for transfer in (0.0, 0.1))
    waits_for_each = at_once + 0.1 * sum(schedule.comes_from_afar(action) for action in schedule.orders[0])
    assert at_once < late < waits_for_each


@pytest.mark.parametrize("fault", ["swapped", "missing", "misplaced", "deadlock"])
def test_a_wrong_schedule_is_found(fault: str) -> None:
    right = interleaved_1f1b(2, 2, 4)
    orders = [list(order) for order in right.orders]
    if fault == "swapped":
        orders[0][0], orders[0][-1] = orders[0][-1], orders[0][0]
    elif fault == "missing":
        orders[1].pop()
    elif fault == "misplaced":
        orders[0][0], orders[1][0] = orders[1][0], orders[0][0]
    else:
        orders = [[Action(1, 0), Action(0, 0)], [Action(1, 0), Action(0, 0)]]
    with pytest.raises(RuntimeError):
        dataclasses.replace(right, orders=tuple(map(tuple, orders))).check()


def test_a_wrong_order_of_one_piece_each_is_found() -> None:
    with pytest.raises(RuntimeError, match=r"deadlocks|before"):
        Schedule(
            1, 1, ((Action(0, 0, backward=True), Action(0, 0)), (Action(1, 0), Action(1, 0, backward=True)))
        ).check()
