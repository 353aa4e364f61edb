"""GPTQ: codes of 2, 3, 4 or 8 bits with a zero point and a scale for each group of inputs.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(https://arxiv.org/abs/2210.17323); the files are those of AutoGPTQ, optimum and GPTQModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
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
    GROUPS,
    OF_MAKING,
    SCALE_TYPES,
    SCALES,
    ZEROS,
    find_grouped,
    group_size,
    groups_of,
)
from lightning_pipelite.models.stored.packed import WORD, unpack

FORMATS = ["gptq", "gptq_v2", None]
BACKENDS = [None, "auto", "auto_trainable"]


class Gptq:
    """For a layer [out, in], packed along the inputs: ``NAME.qweight`` [in * bits / 32, out], and for its groups
    ``NAME.qzeros`` [groups, out * bits / 32] and ``NAME.scales`` [groups, out]. ``NAME.g_idx`` [in] is the group of
    each input: with desc_act, a group's inputs are not contiguous.

    Args:
        config: The ``quantization_config``.
    """  # noqa: D205

    keeps: Keeps | None = None
    double_quant = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        refuse_unknown(
            config,
            {
                **OF_MAKING,
                "bits": [2, 3, 4, 8],
                "group_size": None,
                "desc_act": [True, False, None],
                "format": FORMATS,
                "checkpoint_format": FORMATS,
                "method": ["gptq", None],
                "backend": BACKENDS,
                "pack_dtype": ["int32", None],
                "is_marlin_format": [False, None],
                "dynamic": None,
                "rotation": [None],
            },
        )
        if (bits := config.get("bits")) is None:
            raise ConfigurationError("quantization_config has no bits; fetch config.json again.")
        dynamic = config.get("dynamic") or {}
        if not all(isinstance(key, str) and key.startswith("-:") for key in dynamic):  # layers that are not quantised
            raise ConfigurationError(
                "quantization_config: dynamic quantises some layers differently, which is not supported; use a "
                "bfloat16 version of the model."
            )
        named = {config.get(key) for key in ("format", "checkpoint_format")} - {None}
        if len(named) > 1:
            raise ConfigurationError(
                "quantization_config: format and checkpoint_format contradict each other; fetch config.json again."
            )
        self._less_one = named != {"gptq_v2"}
        self._bits, self._group, self._reordered = int(bits), group_size(config), bool(config.get("desc_act"))
        self.bits = self._bits + (16 + self._bits) / (self._group or 1024)
        self.title = f"{bits}-bit GPTQ"

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights, [out, in] as linear layers have them."""
        return find_grouped(entries, lambda stem: self._weight(entries, stem))

    def _weight(self, entries: Entries, stem: str) -> Quantised:
        name, codes, order = f"{stem}.weight", f"{stem}{CODES}", f"{stem}{GROUPS}"
        part(entries, name, codes, ["I32"])
        shape = shape_of(entries, codes)
        if len(shape) != 2 or shape[0] * WORD % self._bits:
            raise misfit(
                name, f"has shape {list(shape)}, but must be a matrix of {self._bits}-bit codes in {WORD}-bit words"
            )
        out, width = shape[1], shape[0] * WORD // self._bits
        if out * self._bits % WORD:
            raise misfit(name, f"has {out} outputs, which do not fill whole {WORD}-bit words")
        groups = groups_of(name, width, self._group)
        zeros = part(entries, name, f"{stem}{ZEROS}", ["I32"], (groups, out * self._bits // WORD))
        scales = part(entries, name, f"{stem}{SCALES}", SCALE_TYPES, (groups, out))
        parts: tuple[str, ...] = (codes, zeros, scales)
        if self._reordered or order in entries:
            parts = (*parts, part(entries, name, order, ["I32", "I64"], (width,)))

        def dequantise(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            codes, zeros, scales = parts[:3]
            plain = torch.arange(width, device=codes.device) // (self._group or width)
            group = parts[3].long() if len(parts) > 3 else plain
            if not self._reordered and not torch.equal(group, plain):
                raise misfit(name, "has its inputs in another order, but desc_act is false: libraries interpret "
                             "this in different ways")  # fmt: skip
            if not bool(((group >= 0) & (group < groups)).all()):
                raise misfit(name, f"has inputs outside its {groups} groups")
            offsets = self._zero_points(name, zeros)
            # As the libraries do, in the dtype of the scales; a difference of codes is exact in each of these dtypes.
            steps = unpack(codes.T.contiguous(), self._bits) - offsets.T[:, group]
            return (steps.to(scales.dtype) * scales.T[:, group]).to(dtype)

        return Quantised(name, (out, width), parts, dequantise)

    def _zero_points(self, name: str, words: Tensor) -> Tensor:
        """Return the zero points [groups, out]. Version 1 of the format stores them minus one."""
        stored = unpack(words, self._bits)
        if not self._less_one:
            return stored
        if bool((stored == 2**self._bits - 1).any()):
            raise ConfigurationError(
                f"the quantised weight {name} has zero points of 0, stored minus one, which libraries interpret in "
                "different ways; use a version of the model in version 2 of GPTQ's format (gptq_v2), or in bfloat16."
            )
        return stored + 1
