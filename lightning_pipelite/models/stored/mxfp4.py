"""MXFP4: fused experts as 4-bit values, 32 of which share a power of two (gpt-oss).

Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification"
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.models.stored.format import (
    Entries,
    Keeps,
    Quantised,
    Read,
    misfit,
    part,
    refuse_unknown,
    shape_of,
)
from lightning_pipelite.models.transformers_compat import dequantise_mxfp4

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = 16  # two values per byte


class Mxfp4:
    """Blocks ``NAME_blocks``, bytes [experts, out, blocks, 16], and exponents ``NAME_scales`` [experts, out, blocks].

    Args:
        config: The ``quantization_config``.
    """

    title, bits, double_quant = "MXFP4", 4.25, False
    keeps: Keeps | None = None

    def __init__(self, config: Mapping[str, Any]) -> None:
        # The files show what is not converted: they hold it unquantised.
        refuse_unknown(config, {"modules_to_not_convert": None, "dequantize": None})

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights, [experts, in, out] as in the model."""
        for scales in (name for name in entries if name.endswith(SCALES)):
            part(entries, scales.removesuffix(SCALES), scales.removesuffix(SCALES) + BLOCKS, ["U8"])
        for blocks in (name for name in entries if name.endswith(BLOCKS)):
            name, shape = blocks.removesuffix(BLOCKS), shape_of(entries, blocks)
            part(entries, name, blocks, ["U8"])
            if len(shape) != 4 or shape[3] != BLOCK_BYTES:
                raise misfit(name, f"requires its tensor {blocks} in blocks of {BLOCK_BYTES} bytes, not {list(shape)}")
            scales = part(entries, name, name + SCALES, ["U8"], shape[:3])
            experts, size, count, _ = shape
            yield Quantised(name, (experts, count * 2 * BLOCK_BYTES, size), (blocks, scales), _dequantise)


def _dequantise(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantise one expert at a time, as the codes take four bytes each on the way."""
    blocks, scales = parts
    experts, size, count, width = blocks.shape
    weight = torch.empty(experts, count * 2 * width, size, dtype=dtype, device=blocks.device)
    for expert in range(experts):
        one = slice(expert, expert + 1)
        weight[one] = dequantise_mxfp4(blocks[one], scales[one], dtype)
    return weight
