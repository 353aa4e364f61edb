"""The process groups of a job, which end with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


class JobGroups:
    """Notes which process groups are made, and destroys these, and no others.

    DeepSpeed's grid makes five for each pipeline, of which it destroys none: with gloo each is some threads and
    sockets, with NCCL memory on the GPU. The default group stays: it is Lightning's, which takes it again in the next
    run, or the user's.
    """

    def __init__(self) -> None:
        self._groups: list[Any] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note that what is made within it is the job's."""
        before = set(_existing())
        try:
            yield
        finally:
            self._groups += [group for group in _existing() if group not in before]

    def destroy(self) -> None:
        """Destroy them all."""
        groups, self._groups = self._groups, []
        here = set(_existing())
        for group in reversed(groups):
            if group in here:
                dist.destroy_process_group(group)


def _existing() -> list[Any]:
    """Return the groups of this process, in the order in which they were made. torch has no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)
