"""Parameters that occur in several stages, such as an embedding tied to the head."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_pipelite.errors import ConfigurationError


class TiedParameters:
    """Keeps the copies of a tied parameter bitwise equal: the same initial values, the same gradient.

    Parameters with equal names in several stages of a pipeline are tied. Constructing it is collective over all ranks.

    Args:
        stage: This rank's stage.
        group: The process group of this rank's pipeline.
        pipelines: The global ranks of every pipeline, in the order of their stages.
        timeout: How long a rank waits for the others.

    Raises:
        ConfigurationError: If a tied parameter is trained in one stage and frozen in another, or has another shape or
            dtype there.
    """

    def __init__(self, stage: nn.Module, group: Any, pipelines: Sequence[Sequence[int]], timeout: timedelta) -> None:
        mine = {name: (p.requires_grad, tuple(p.shape), p.dtype) for name, p in stage.named_parameters()}
        everyones: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyones, mine, group=group)
        names = {name for own in everyones for name in own}
        owners = {name: [i for i, theirs in enumerate(everyones) if name in theirs] for name in names}
        tied = {name: tuple(stages) for name, stages in owners.items() if len(stages) > 1}
        for name, stages in tied.items():
            trained, shapes, dtypes = (set(each) for each in zip(*(everyones[i][name] for i in stages), strict=True))
            if len(trained) > 1 or len(shapes) > 1 or len(dtypes) > 1:
                how = "not trained in all of them" if len(trained) > 1 else "with different shapes or dtypes"
                raise ConfigurationError(
                    f"{name} is in stages {' and '.join(map(str, stages))}, but {how}; parameters with the same name "
                    "are tied: give distinct ones names that do not depend on the partition."
                )

        parameters = dict(stage.named_parameters())
        rank = dist.get_rank()
        groups: dict[tuple[int, ...], Any] = {}
        for stages in sorted(set(tied.values())):
            for pipeline in pipelines:  # every rank must take part in creating every group
                ranks = tuple(pipeline[i] for i in stages)
                made = dist.new_group(list(ranks), timeout=timeout)
                if rank in ranks:
                    groups[stages] = (made, ranks[0])
        self._tied = [
            (parameters[name], *groups[stages])
            for name, stages in sorted(tied.items())
            if stages in groups and name in parameters
        ]
        unequal = 0
        for parameter, made, source in self._tied:
            before = _digest(parameter)
            dist.broadcast(parameter.data, src=source, group=made)
            unequal += before != _digest(parameter)
        if tied:
            self._tell(sorted(tied), unequal, group)
        self._counted_elsewhere = {id(p) for p, _, source in self._tied if source != rank}
        self.names = sorted(tied)

    @staticmethod
    def _tell(names: list[str], unequal: int, group: Any) -> None:
        """Warn, on rank 0, of parameters that share a name and perhaps nothing else. Collective."""
        counts = [0] * dist.get_world_size(group)
        dist.all_gather_object(counts, unequal, group=group)
        if any(counts):
            rank_zero_warn(
                f"{', '.join(names[:3])}{', ...' * (len(names) > 3)} occur in several stages and had different initial "
                "values; parameters with the same name are tied, and now have the first stage's values. If they are "
                "not meant to be tied, give them names that do not depend on the partition."
            )

    def reduce(self) -> None:
        """Sum the gradients of tied parameters over their stages. Collective."""
        for parameter, group, _ in self._tied:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=group)

    def counts_here(self, parameter: Tensor) -> bool:
        """Return whether this stage counts the parameter in norms over all stages; only one stage does."""
        return id(parameter) not in self._counted_elsewhere


def _digest(parameter: Tensor) -> str:
    """Return a digest as text, so that NaN equals NaN."""
    values = parameter.detach().flatten()
    some = values[:: max(1, len(values) // 1024)].double()
    return f"{float(values.sum(dtype=torch.float64))!r}, {float(some.norm())!r}"
