"""What the stages of a pipeline must agree on about their micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MicroBatch = tuple[Any, Any]
"""``(inputs, targets)``: the input of the first stage, and what the loss on the last stage needs."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 6364136223846793005  # multiples of it modulo 2**64 spread over all bits


def shapes_of(batch: Any) -> Any:
    """Return what the shapes between stages may depend on; an unknown object equals nothing, not even itself."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, Mapping):
        return [(key, shapes_of(item)) for key, item in batch.items()]
    if isinstance(batch, (tuple, list)):
        return [shapes_of(item) for item in batch]
    return batch if batch is None or isinstance(batch, (bool, int, float, str)) else object()


def described(batch: Any) -> str:
    """Describe a batch without reading its tensors' values, for example ``[3, 8] float32``."""
    if isinstance(batch, Tensor):
        return f"{list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return f"{{{', '.join(f'{key}: {described(item)}' for key, item in batch.items())}}}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(map(described, batch))})"
    return repr(batch) if batch is None or isinstance(batch, (bool, int, float, str)) else type(batch).__name__


def fingerprint(batch: Any, device: torch.device) -> Tensor:
    """Return a number below 2**32 that identifies the values of a batch's tensors; a float64 scalar.

    It is computed from integers only, so it is the same on a CPU and on a GPU, where it needs no host synchronisation.

    Args:
        batch: Tensors, in tuples, lists and mappings.
        device: The device of the result.
    """
    alike: dict[Any, list[Tensor]] = {}  # stacked, they take as many kernel launches as one
    places: dict[Any, list[int]] = {}
    for place, tensor in enumerate(_tensors(batch)):
        kind = tensor.shape, tensor.dtype, tensor.device
        alike.setdefault(kind, []).append(tensor.detach())
        places.setdefault(kind, []).append(place)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for kind, tensors in alike.items():
        weights = torch.tensor([_signed(pow(_ODD, place + 1, 2**64)) for place in places[kind]])
        total += (_numbers(torch.stack(tensors)).to(device) * weights.to(device, non_blocking=True)).sum()
    return ((total * _ODD >> 32) & 0xFFFFFFFF).double()


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.layout == torch.strided and not batch.is_quantized:
            yield batch
    else:
        for item in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ():
            yield from _tensors(item)


def _numbers(tensors: Tensor) -> Tensor:
    """Return a number for each of the stacked tensors [tensors, ...], as [tensors].

    It depends on all bits and on their positions along each dimension, so a sample in another place gives another
    number.
    """
    tensors = torch.view_as_real(tensors) if tensors.is_complex() else tensors
    bits = tensors.contiguous().view(_INTEGERS[tensors.element_size()])
    numbers = torch.full(bits.shape[:1], math.prod(bits.shape[1:]), dtype=torch.int64, device=bits.device)
    for dim, size in enumerate(bits.shape[1:], start=1):
        others = [other for other in range(1, bits.dim()) if other != dim and bits.shape[other] != 1]
        along = bits.sum(others, dtype=torch.int64) if others else bits.long()
        weights = torch.arange(1, size + 1, device=bits.device) * _ODD
        numbers = numbers * _ODD + (along.view(len(bits), size) * (weights ^ (weights >> 29))).sum(1)
    return numbers if bits.dim() > 1 else numbers * _ODD + bits.long()


def all_shapes(micro_batches: Sequence[MicroBatch]) -> str:
    """Describe all micro-batches of a step; consecutive ones with the same description are merged."""
    rows: list[tuple[str, int]] = []
    for batch in micro_batches:
        words = described(batch)
        rows.append((words, rows.pop()[1] + 1) if rows and rows[-1][0] == words else (words, 1))
    return ", ".join(f"{number} of {words}" for words, number in rows)
