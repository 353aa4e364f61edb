"""AWQ: 4-bit codes with a zero point and a scale for each group of inputs, in the order of its gemm kernels.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
(https://arxiv.org/abs/2306.00978); the files are those of AutoAWQ.
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
from lightning_pipelite.models.stored.grouped import (
    CODES,
    OF_MAKING,
    SCALE_TYPES,
    SCALES,
    ZEROS,
    find_grouped,
    group_size,
    groups_of,
)
from lightning_pipelite.models.stored.packed import WORD, unpack

BITS = 4
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""The position in a word of each of its eight outputs: a kernel unpacks those that are four apart together."""
GEMM = ["gemm", "GEMM", None]
BACKENDS = [None, "autoawq", "auto", "auto_trainable", "gemm", "gemm_triton", "torch_awq"]


class Awq:
    """For a layer [out, in], packed along the outputs: ``NAME.qweight`` [in, out / 8], and for its groups
    ``NAME.qzeros`` [groups, out / 8] and ``NAME.scales`` [groups, out].

    Args:
        config: The ``quantization_config``.
    """  # noqa: D205

    title, double_quant = "4-bit AWQ", False
    keeps: Keeps | None = None

    def __init__(self, config: Mapping[str, Any]) -> None:
        refuse_unknown(
            config,
            {
                **OF_MAKING,
                "bits": [BITS, None],
                "w_bit": [BITS, None],
                "group_size": None,
                "version": GEMM,
                "format": GEMM,
                "zero_point": [True, None],
                "desc_act": [False, None],
                "backend": BACKENDS,
                "method": ["awq", None],
                "pack_dtype": ["int32", None],
                "do_fuse": None,
                "fuse_max_seq_len": None,
                "modules_to_fuse": None,
            },
        )
        self._group = group_size(config)
        self.bits = BITS + (16 + BITS) / (self._group or 1024)

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights, [out, in] as linear layers have them."""
        return find_grouped(entries, lambda stem: self._weight(entries, stem))

    def _weight(self, entries: Entries, stem: str) -> Quantised:
        name, codes = f"{stem}.weight", f"{stem}{CODES}"
        part(entries, name, codes, ["I32"])
        shape = shape_of(entries, codes)
        if len(shape) != 2:
            raise misfit(name, f"has shape {list(shape)}, but must be a matrix")
        width, out = shape[0], shape[1] * WORD // BITS
        groups = groups_of(name, width, self._group)
        zeros = part(entries, name, f"{stem}{ZEROS}", ["I32"], (groups, shape[1]))
        scales = part(entries, name, f"{stem}{SCALES}", SCALE_TYPES, (groups, out))

        def dequantise(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            codes, zeros, scales = parts
            offsets, factors = (each.repeat_interleave(width // groups, dim=0) for each in (_unpack(zeros), scales))
            # As the libraries do, in the dtype of the scales; a difference of codes is exact in each of these dtypes.
            return ((_unpack(codes) - offsets).to(scales.dtype) * factors).to(dtype).T.contiguous()

        return Quantised(name, (out, width), (codes, zeros, scales), dequantise)


def _unpack(words: Tensor) -> Tensor:
    return unpack(words, BITS).unflatten(-1, (-1, len(PLACES)))[..., PLACES].flatten(-2)
