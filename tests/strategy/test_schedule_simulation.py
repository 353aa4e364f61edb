"""The simulation reproduces known figures of 1F1B: Narayanan et al., 2021 (arXiv 2104.04473), section 2.2."""

from __future__ import annotations

import pytest

from schedule_simulation import Stage, simulate


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 2), (2, 16), (3, 7), (4, 16), (8, 8), (64, 32)])
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 1.0), (1.0, 3.0), (2.5, 0.5)])
def test_equal_stages_idle_for_the_known_share(
    stages: int, micro_batches: int, forward: float, backward: float, blocking: bool
) -> None:
    step = simulate([Stage(forward, backward)] * stages, micro_batches, blocking=blocking)
    bubble = (stages - 1) / (micro_batches + stages - 1)
    assert 1 - step.efficiency == pytest.approx(bubble, abs=1e-9)
    assert step.seconds == pytest.approx((micro_batches + stages - 1) * (forward + backward))


def test_the_slowest_stage_sets_the_pace() -> None:
    """Worked out by hand: the middle stage always computes, apart from three waits.

    First it waits for the forward pass before it (1.0). After two forward passes, at 4.0, it waits for the first
    gradient (the last stage has that micro-batch from 2.5 to 5.5). At the end, the first stage still has a backward
    pass (2.0) to do.
    """
    stages = [Stage(1.0, 2.0), Stage(1.5, 3.0), Stage(1.0, 2.0)]
    more, fewer = (simulate(stages, number) for number in (40, 39))
    assert more.seconds - fewer.seconds == pytest.approx(4.5)
    assert more.busy == pytest.approx([120.0, 180.0, 120.0])
    assert more.seconds == pytest.approx(1.0 + 1.5 + 40 * 4.5 + 2.0)


def test_a_sender_that_waits_for_the_transfer_loses_more() -> None:
    stages = [Stage(1.0, 2.0)] * 4
    free, overlapped, blocking = (
        simulate(stages, 16, transfer, waits).seconds for transfer, waits in ((0.0, False), (0.1, False), (0.1, True))
    )
    assert free < overlapped < blocking
    # With two stages, each of the 15 rounds between micro-batches has a transfer each way, and each end has one.
    two = simulate([Stage(1.0, 2.0)] * 2, 16, 0.1, True)
    assert two.seconds == pytest.approx(17 * 3.0 + 17 * 0.1 + 15 * 0.1)
