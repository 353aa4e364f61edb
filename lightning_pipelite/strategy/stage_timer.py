"""How long a stage computes in a step, and how long it waits for the others."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

COMPUTING = ("LoadMicroBatch", "ForwardPass", "BackwardPass")
"""DeepSpeed's names of the instructions that do not need another rank."""


class StageTimer:
    """Measures the times of a step's instructions.

    On a GPU it records events in the stream of the kernels, without host synchronisation: a transfer counts from when
    the stage has nothing else to do until it has arrived. Time in which the GPU idles because the host is late counts
    towards the instruction that is late.

    Args:
        device: The device of the stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = []

    def begin(self, instruction: str) -> None:
        """End the previous instruction and begin this one; an empty name only ends the previous one."""
        now: Any = time.perf_counter()
        if self._stream is not None:
            now = torch.cuda.Event(enable_timing=True)
            now.record(self._stream)
        self._marks.append((instruction, now))

    def seconds(self) -> dict[str, float]:
        """Return the total time of the instructions of each name; waits until the device has finished them."""
        if self._stream is not None and self._marks:
            self._marks[-1][1].synchronize()
        sums: dict[str, float] = {}
        for (name, began), (_, ended) in itertools.pairwise(self._marks):
            passed = ended - began if self._stream is None else began.elapsed_time(ended) / 1000
            sums[name] = sums.get(name, 0.0) + passed
        return sums


def busy_and_waiting(seconds: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of the instructions that compute, and of all others."""
    busy = sum(seconds.get(name, 0.0) for name in COMPUTING)
    return busy, sum(seconds.values()) - busy
