"""What the stages of a pipeline must agree on about their micro-batches."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError

MicroBatch = tuple[Any, Any]
"""``(inputs, targets)``: what the first stage starts from, and what the loss on the last stage needs."""


def require_same_data(micro_batches: Sequence[MicroBatch], group: Any) -> None:
    """Inputs from one sequence and targets from another would train, on nonsense, without any other sign. Collective.

    Args:
        micro_batches: of a step, as this rank has them.
        group: the process group of the pipeline.

    Raises:
        ConfigurationError: if another stage has others.
    """
    digests = [0] * dist.get_world_size(group)
    dist.all_gather_object(digests, _digest(micro_batches), group=group)
    if len(set(digests)) > 1:
        raise ConfigurationError(
            "the stages of a pipeline were given different micro-batches; let the data loader's order and random "
            "numbers depend on nothing that differs between ranks (L.seed_everything(SEED) at the start), and give "
            "its sampler the strategy's distributed_sampler_kwargs."
        )


def shapes_of(batch: Any) -> Any:
    """What the shapes between the stages may depend on; what is unknown equals nothing, not even itself."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, Mapping):
        return [(key, shapes_of(item)) for key, item in batch.items()]
    if isinstance(batch, (tuple, list)):
        return [shapes_of(item) for item in batch]
    return batch if batch is None or isinstance(batch, (bool, int, float, str)) else object()


def _digest(batch: Any, so_far: int = 0) -> int:
    """A checksum of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return zlib.crc32(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), so_far)
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for item in items:
        so_far = _digest(item, so_far)
    return so_far
