"""What ended the job, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.distributed

_COMMUNICATION = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "timed out waiting",
    "gloo/transport",
    "nccl",
)

_INTERRUPTED = "interrupted by Ctrl-C"


@dataclass(frozen=True)
class Failure:
    """What ended the job.

    Args:
        rank: The global rank that failed.
        stage: The pipeline stage of that rank.
        reason: What follows "rank 1 (stage 1) " in the message, in one line.
        kind: Whether the rank raised, died, hung, or exited by KeyboardInterrupt or SystemExit.
        piece: The piece of the stage that ran, such as "piece 3, layers 12 to 15", if there are several.
    """

    rank: int
    stage: int
    reason: str
    kind: Literal["raised", "died", "hung", "interrupted"]
    piece: str = ""

    def __str__(self) -> str:
        if self.kind == "interrupted" and self.reason == _INTERRUPTED:  # a terminal's Ctrl-C reaches all ranks
            return self.reason
        return f"rank {self.rank} (stage {self.stage}{', ' if self.piece else ''}{self.piece}) {self.reason}"

    @classmethod
    def of(cls, exception: BaseException, rank: int, stage: int, piece: str = "") -> Failure:
        """Return the failure of a rank that raised ``exception``."""
        if isinstance(exception, KeyboardInterrupt):
            return cls(rank, stage, _INTERRUPTED, "interrupted")
        if isinstance(exception, SystemExit):
            return cls(rank, stage, f"exited with {_in_one_line(exception)}", "interrupted")
        return cls(rank, stage, f"failed: {_in_one_line(exception)}", "raised", piece)


def is_communication_error(exception: BaseException) -> bool:
    """Return whether ``exception`` may only be a consequence of another rank's failure."""
    return any(
        isinstance(error, (torch.distributed.DistError, ConnectionError))
        or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _COMMUNICATION))
        for error in chain(exception)
    )


def chain(exception: BaseException) -> Iterator[BaseException]:
    """Yield ``exception`` and the exceptions that led to it, from the last to the first."""
    seen: set[int] = set()
    error: BaseException | None = exception
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _in_one_line(exception: BaseException) -> str:
    message = " ".join(str(exception).split())
    if len(message) > 500:
        message = message[:497] + "..."
    return f"{type(exception).__name__}: {message}" if message else type(exception).__name__
