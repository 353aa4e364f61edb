"""The process groups of a job, destroyed at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


class JobGroups:
    """Records the process groups that are created for the job, and destroys only these.

    DeepSpeed's grid creates five per pipeline and destroys none of them: with Gloo each takes some threads and sockets,
    with NCCL GPU memory. The default group stays: it belongs to Lightning, which uses it again in the next run, or to
    the user.
    """

    def __init__(self) -> None:
        self._groups: list[Any] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Record the groups that are created inside the context."""
        before = set(_existing())
        try:
            yield
        finally:
            self._groups += [group for group in _existing() if group not in before]

    def destroy(self) -> None:
        """Destroy the recorded groups."""
        groups, self._groups = self._groups, []
        here = set(_existing())
        for group in reversed(groups):
            if group in here:
                dist.destroy_process_group(group)


def _existing() -> list[Any]:
    """Return this process's groups in the order of their creation; torch has no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)
