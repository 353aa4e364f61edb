"""Finds tensors that are not finite, and names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_pipelite.shared.topology import Topology

NAMED = 3  # names listed before "and N more"


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold a NaN or an infinity. Synchronises the host once with each GPU.

    Args:
        tensors: By name, of any dtype; all but floating ones count as finite.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append((name, tensor.detach()))
    found: set[str] = set()
    for named in by_device.values():
        # The largest absolute value: unlike a sum it does not overflow, and unlike isfinite it needs no memory.
        largest = torch._foreach_norm([tensor for _, tensor in named], torch.inf)
        finite = torch.stack([value.float() for value in largest]).isfinite().tolist()
        found.update(name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite)
    return [name for name in tensors if name in found]


def in_words(names_by_stage: Sequence[Sequence[str]]) -> str:
    """List the names of parameters and their stages, such as "0.weight, 0.bias (stage 0); 2.weight (stage 1)"."""
    stages = []
    for stage, names in enumerate(names_by_stage):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            stages.append(f"{', '.join(names[:NAMED])}{more} (stage {stage})")
    return "; ".join(stages)


def refuse_not_finite(
    what: str, tensors: Mapping[str, Tensor], topology: Topology, share: Callable[[Any], list[Any]]
) -> None:
    """Keep weights that are not finite from replacing sound ones on disk. Collective.

    Training stops at gradients that are not finite, but an optimizer or a callback may still produce such weights.

    Args:
        what: What will not be written, for the message.
        tensors: This rank's tensors, by name.
        topology: The job's topology.
        share: Returns every rank's value, by rank.

    Raises:
        RuntimeError: On every rank, naming the tensors of all stages that are not finite.
    """
    everyones = share(not_finite(tensors))
    stages = [everyones[topology.rank_of(stage, 0)] for stage in range(topology.stages)]
    if any(stages):
        raise RuntimeError(
            f"{what} is not written, because it would hold values that are nan or infinite: {in_words(stages)}; "
            "resume from an earlier checkpoint, for example with a smaller learning rate"
        )
