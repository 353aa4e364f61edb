"""The time that steps take, excluding what comes between them."""

from __future__ import annotations

import time
from collections import deque

STEPS_AVERAGED = 50


class StepClock:
    """Runs while steps are taken, and stops while it is paused. All times are in seconds."""

    def __init__(self) -> None:
        self.steps = 0
        self._elapsed = 0.0
        self._since: float | None = time.monotonic()
        self._step_began = 0.0
        self._durations: deque[float] = deque(maxlen=STEPS_AVERAGED)

    @property
    def elapsed(self) -> float:
        """The time for which the clock has run."""
        return self._elapsed + (time.monotonic() - self._since if self._since is not None else 0.0)

    def pause(self) -> None:
        """Stop the clock."""
        self._elapsed, self._since = self.elapsed, None

    def go_on(self) -> None:
        """Start the clock again."""
        if self._since is None:
            self._since = time.monotonic()

    def step(self) -> float:
        """Record the end of a step, which is the start of the next, and return how long it took."""
        elapsed = self.elapsed
        duration = elapsed - self._step_began
        if self.steps == 1:  # the first compiles and allocates: it says nothing about later ones
            self._durations.clear()
        self._durations.append(duration)
        self._step_began = elapsed
        self.steps += 1
        return duration

    def remaining(self, steps: int) -> float | None:
        """Estimate the time of further steps from the mean of the last ones, at most 50; None before the first."""
        return steps * sum(self._durations) / len(self._durations) if self._durations else None
