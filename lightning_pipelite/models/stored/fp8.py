"""FP8: weights in e4m3 with a scale per block, or one for the whole tensor (DeepSeek, Qwen, MiniMax, Mistral).

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (https://arxiv.org/abs/2412.19437), section 3.3.
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

CODES = "F8_E4M3"
SCALE_TYPES = ["F32", "BF16", "F16", "F8_E8M0"]
SCALES = {"_scale_inv": "", ".scale": ".weight", ".qscale_weight": ".weight"}
"""Suffixes of scales' names, each with the suffix of the weight's name that it replaces."""
ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")


class Fp8:
    """Codes ``NAME`` and scales ``NAME_scale_inv``, by which they are multiplied.

    Args:
        config: The ``quantization_config``.
    """

    title, bits, double_quant = "FP8", 8.0, False

    def __init__(self, config: Mapping[str, Any]) -> None:
        refuse_unknown(
            config,
            {
                "activation_scheme": ["dynamic", "static"],  # how inputs are quantised for products in FP8
                "fmt": ["e4m3", "float8_e4m3fn", None],
                "scale_fmt": ["float", "ue8m0", None],
                "expert_dtype": ["fp8", None],
                "weight_block_size": None,
                "dequantize": None,
                # The files show what is quantised.
                "modules_to_not_convert": None,
                "modules_to_convert": None,
                "ignored_layers": None,
            },
        )
        block = config.get("weight_block_size", [128, 128])
        if block is not None and not (
            isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        ):
            raise ConfigurationError(
                f"quantization_config: weight_block_size is {block!r}, not two positive integers; fetch "
                "config.json again."
            )
        self._block: tuple[int, int] | None = None if block is None else tuple(block)
        self.keeps: Keeps | None = None if block else "load_in_fp8"
        self.title = f"FP8 in blocks of {block[0]} by {block[1]}" if block else "FP8 with a scale for each tensor"

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights."""
        used: set[str] = set()
        for name, entry in entries.items():
            if entry["dtype"] == CODES:
                found = self._weight(entries, name)
                used.update(found.parts, found.unused)
                yield found
        for name in sorted(entries.keys() - used):
            if name.endswith(("_scale_inv", ".qscale_weight", *ACTIVATIONS)):
                raise misfit(name, f"is a scale that does not belong to any weight in {CODES}")

    def _weight(self, entries: Entries, name: str) -> Quantised:
        names = [name.removesuffix(own) + end for end, own in SCALES.items() if name.endswith(own)]
        held = [each for each in names if each in entries]
        if len(held) > 1:
            raise misfit(name, f"has two scales, {held[0]} and {held[1]}")
        scale = part(entries, name, (held or names)[0], SCALE_TYPES)
        shape, grid = shape_of(entries, name), shape_of(entries, scale)
        stem = name.rpartition(".")[0]
        unused = tuple(n for end in ACTIVATIONS for n in (f"{stem}.{end}", f"{name}_{end}") if n in entries)
        if len(shape) < 2:
            raise misfit(name, f"has shape {list(shape)}, but must be a matrix")
        if self._block is None:
            # One for each expert if they are fused.
            if grid not in ((), (1,), (*shape[:-2], 1, 1)):
                raise misfit(name, f"requires a single scale, but {scale} has shape {list(grid)}")
            return Quantised(name, shape, (name, scale), _by_tensor, unused, _kept if len(shape) == 2 else None)
        block = self._block
        wanted = (*shape[:-2], *(-(-size // side) for size, side in zip(shape[-2:], block, strict=True)))
        part(entries, name, scale, SCALE_TYPES, wanted)
        for size, side, count in zip(shape[-2:], block, wanted[-2:], strict=True):
            # transformers ignores the size of blocks and assumes as many equal blocks as there are scales.
            if size % side and size % count == 0 and count > 1:
                raise misfit(
                    name, f"has shape {list(shape)}, which is not divisible into blocks of {list(block)}: libraries "
                    "interpret this in different ways"
                )  # fmt: skip

        def by_block(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            return _by_block(parts, dtype, block)

        return Quantised(name, shape, (name, scale), by_block, unused)


def _by_tensor(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    codes, scale = parts
    return (codes.float() * scale.float()).to(dtype)


def _kept(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    codes, scale = parts
    return codes, scale.float().reshape(1).expand(codes.shape[0]).contiguous()


def _by_block(parts: list[Tensor], dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """Dequantise in float32, one row of blocks at a time; the last blocks may be smaller."""
    codes, scales = parts
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, columns = block
    for number in range(scales.shape[-2]):
        some = slice(number * rows, (number + 1) * rows)
        factors = scales[..., number : number + 1, :].float().repeat_interleave(columns, dim=-1)
        weight[..., some, :] = (codes[..., some, :].float() * factors[..., : codes.shape[-1]]).to(dtype)
    return weight
