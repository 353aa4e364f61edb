"""Measured times tell whether a stage computes or waits: one stage sleeps in every forward pass."""

from __future__ import annotations

import pytest

from clock_jobs import MICRO_BATCHES, NAP, measured
from processes import Workers


def test_a_stage_waits_while_the_other_one_computes(workers: Workers) -> None:
    first, second = workers.run(2, measured)
    for seen in (first, second):
        assert [step for step, (times, _) in enumerate(seen) if times is not None] == [1]  # the one to be measured
        (busy, waiting), instructions = seen[1]
        assert busy + waiting == pytest.approx(sum(instructions.values()))
        # The last backward pass of the first stage, and the end of the step, come after all naps.
        assert busy + waiting >= MICRO_BATCHES * NAP
    (_, waiting), instructions = first[1]
    assert waiting >= instructions["RecvGrad"] >= NAP
    assert {"ForwardPass", "BackwardPass", "SendActivation"} <= instructions.keys()
    (busy, _), instructions = second[1]
    assert busy >= instructions["ForwardPass"] >= MICRO_BATCHES * NAP
