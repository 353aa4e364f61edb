"""Parameters that stand in several stages, such as an embedding tied to the head."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TiedParameters:
    """Keeps the copies of a tied parameter equal to the bit: the same start, the same gradient.

    Parameters with equal names in several stages of a pipeline are tied. Building it is collective over all ranks.

    Args:
        stage: This rank's stage.
        group: The process group of this rank's pipeline.
        pipelines: The global ranks of every pipeline, in the order of their stages.
        timeout: How long a rank waits for the others.

    Raises:
        RuntimeError: If a tied parameter is trained in one stage and frozen in another.
    """

    def __init__(self, stage: nn.Module, group: Any, pipelines: Sequence[Sequence[int]], timeout: timedelta) -> None:
        mine = {name: p.requires_grad for name, p in stage.named_parameters()}
        everyones: list[dict[str, bool]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyones, mine, group=group)
        names = {name for own in everyones for name in own}
        owners = {name: [i for i, theirs in enumerate(everyones) if name in theirs] for name in names}
        tied = {name: tuple(stages) for name, stages in owners.items() if len(stages) > 1}
        for name, stages in tied.items():
            if len({everyones[i][name] for i in stages}) > 1:
                raise RuntimeError(f"{name} is tied between stages {list(stages)}, but not trained in all of them")

        parameters = dict(stage.named_parameters())
        rank = dist.get_rank()
        groups: dict[tuple[int, ...], Any] = {}
        for stages in sorted(set(tied.values())):
            for pipeline in pipelines:  # every rank takes part in making every group
                ranks = tuple(pipeline[i] for i in stages)
                made = dist.new_group(list(ranks), timeout=timeout)
                if rank in ranks:
                    groups[stages] = (made, ranks[0])
        self._tied = [
            (parameters[name], *groups[stages])
            for name, stages in sorted(tied.items())
            if stages in groups and name in parameters
        ]
        for parameter, made, source in self._tied:
            dist.broadcast(parameter.data, src=source, group=made)
        self._counted_elsewhere = {id(p) for p, _, source in self._tied if source != rank}
        self.names = sorted(tied)

    def reduce(self) -> None:
        """Sum the gradients of tied parameters over their stages. Collective."""
        for parameter, group, _ in self._tied:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=group)

    def counts_here(self, parameter: Tensor) -> bool:
        """Whether this stage counts the parameter in norms over all stages: each is counted in one."""
        return id(parameter) not in self._counted_elsewhere
