"""Whether a pipeline would be faster without one of its devices."""

from __future__ import annotations

from lightning_pipelite.planning.planner import WORTH, Planner
from lightning_pipelite.planning.stages import step


def faster_without(planner: Planner, stages: int, policy: str, virtual_stages: int) -> str:
    """Return a sentence if a step would be faster without the slowest stage's devices, else an empty string.

    Both splits are by ``partition_method`` auto, with the same number of micro-batches per step and of replicas.

    Args:
        planner: Planner of the training on all devices.
        stages: Number of pipeline stages.
        policy: Activation memory policy with all devices; without some, it is the first that fits.
        virtual_stages: Pieces per stage.
    """
    speeds = planner.devices.speed_of_stages(stages)
    if stages < 2 or not speeds:
        return ""

    def time(on: Planner, count: int, how: str) -> float:
        pieces = virtual_stages if count > 1 else 1
        return step(
            on.stages(on.split(count, "auto", how, pieces), how, virtual_stages=pieces), on.micro_batches
        ).seconds

    slowest = min(range(stages), key=lambda stage: speeds[stage])
    others = planner.on(planner.devices.without_stage(slowest, stages))
    how = others.choose_policy(stages - 1, "auto", virtual_stages if stages > 2 else 1)
    if how is None:
        return ""
    with_it, without = time(planner, stages, policy), time(others, stages - 1, how)
    if without > (1 - WORTH) * with_it:
        return ""
    return (
        f"the devices of stage {slowest} are so slow ({speeds[slowest]:.2f} of the fastest) that a step is faster "
        f"without them ({without:.2f} s instead of {with_it:.2f} s): leave them out, and set pipeline_stages to "
        f"{stages - 1}."
    )
