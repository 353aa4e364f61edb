"""The end of the network on a rank other than 0."""

from __future__ import annotations

import time
from dataclasses import asdict
from multiprocessing import connection
from typing import Any

from lightning_pipelite.strategy.watchdog import timeouts
from lightning_pipelite.strategy.watchdog.failure import Failure
from lightning_pipelite.strategy.watchdog.link import Link
from lightning_pipelite.strategy.watchdog.processes import describe_exit


class Client:
    """The connection to rank 0, whose death is a failure as well.

    Args:
        link: The connection, on which this rank has already introduced itself.
        coordinator_stage: The pipeline stage of rank 0, for the message.

    Attributes:
        failure: What ended the job, once rank 0 has reported it or is lost.
        lost: Whether rank 0 has died or does not answer.
    """

    def __init__(self, link: Link, coordinator_stage: int) -> None:
        self.failure: Failure | None = None
        self.lost = False
        self._link: Link | None = link
        self._coordinator_stage = coordinator_stage
        self._coordinator_left = False
        self._reported: Failure | None = None
        self._reported_at = 0.0

    @property
    def alone(self) -> bool:
        """Whether the connection is closed."""
        return self._link is None

    def turn(self, seconds: float) -> None:
        """Wait up to ``seconds`` for something to happen, and handle it."""
        for link in connection.wait([self._link] if self._link else [], seconds):  # type: ignore[list-item]
            assert isinstance(link, Link)
            self._read(link)
        if self.failure is None and self._is_lost():
            self.lost = True
            self.failure = self._reported or Failure(0, self._coordinator_stage, describe_exit(None), "died")

    def report(self, failure: Failure) -> None:
        """Report ``failure`` to rank 0, if it is this rank's first."""
        if self._reported is None:
            self._reported, self._reported_at = failure, time.monotonic()
            self.say(failure=asdict(failure))

    def report_exit(self, rank: int, code: int) -> None:
        """Report to rank 0 the exit status of a process that this one has launched."""
        self.say(exit=[rank, code])

    def say(self, **message: Any) -> None:
        """Send ``message`` to rank 0."""
        if self._link is not None:
            self._link.send(**message)

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _read(self, link: Link) -> None:
        try:
            for message in link.receive():
                self._coordinator_left |= "bye" in message
                if "failure" in message and self.failure is None:
                    self.failure = Failure(**message["failure"])
        except EOFError:
            self.close()

    def _is_lost(self) -> bool:
        if self._reported is None:
            return self.alone and not self._coordinator_left
        return self.alone or time.monotonic() - self._reported_at > timeouts.RELAY
