"""Compressed-tensors: 4- or 8-bit integers packed in int32, 8-bit integers, and FP8, each with symmetric scales.

https://github.com/vllm-project/compressed-tensors
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
from lightning_pipelite.models.stored.packed import WORD, unpack

FORMATS = {
    ("pack-quantized", "int", 4): "I32",
    ("pack-quantized", "int", 8): "I32",
    ("int-quantized", "int", 8): "I8",
    ("float-quantized", "float", 8): "F8_E4M3",
}
"""The dtype of the codes in the files, by format, number type and bits."""
SCALE_TYPES = ["F32", "BF16", "F16"]
ENDS = tuple(f".weight_{end}" for end in ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale"))
GROUP = {"targets": None, "weights": None, "input_activations": None, "output_activations": [None]}
WEIGHTS = {
    "num_bits": None,
    "type": None,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "symmetric": [True],
    "dynamic": [False],
    "actorder": [None, False, "static", "weight"],  # others group columns in another order
    "observer": None,
    "observer_kwargs": None,
    "scale_dtype": None,
    "zp_dtype": None,
}


class CompressedTensors:
    """Codes ``NAME`` or, if packed, ``NAME_packed`` and ``NAME_shape``; and scales ``NAME_scale``.

    Args:
        config: The ``quantization_config``.
    """

    double_quant = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        refuse_unknown(
            config,
            {
                "format": None,
                "config_groups": None,
                "quantization_status": ["compressed"],
                "kv_cache_scheme": [None],
                "sparsity_config": [None, {}],
                "transform_config": [None, {}],
                "global_compression_ratio": None,
                "version": None,
                "ignore": None,  # the files show what is quantised
                "dequantize": None,
                "run_compressed": None,
            },
        )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
            raise ConfigurationError("quantization_config has no usable config_groups; fetch config.json again.")
        method, form = config["quant_method"], config.get("format")
        weights = next(iter(groups.values())).get("weights")
        for name, group in groups.items():
            refuse_unknown({**group, "quant_method": method}, {**GROUP, "format": [form, None]})
            if not isinstance(weights, dict) or group.get("weights") != weights:
                raise ConfigurationError(
                    f"quantization_config: the weights of {name} are quantised differently from others, or not at all, "
                    "which is not supported; use a bfloat16 version of the model."
                )
        refuse_unknown({**weights, "quant_method": method}, WEIGHTS)
        kind = (form, weights.get("type", "int"), weights.get("num_bits", 8))
        if kind not in list(FORMATS):
            raise ConfigurationError(
                f"quantization_config: {kind[0]} with weights of type {kind[1]} in {kind[2]} bits is not supported; "
                "use a bfloat16 version of the model."
            )
        self._codes, self._count = FORMATS[kind], kind[2]
        self._sides = _sides(weights)
        self.bits = 4.5 if self._count == 4 else 8.0
        by_row = self._codes == "F8_E4M3" and self._sides in (None, (1, 0))
        self.keeps: Keeps | None = "load_in_fp8" if by_row else None
        self.title = f"compressed-tensors {form} in {self._count} bits"

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights."""
        used: set[str] = set()
        end = ".weight_packed" if self._codes == "I32" else ".weight"
        for codes, entry in entries.items():
            if codes.endswith(end) and (end != ".weight" or entry["dtype"] == self._codes):
                found = self._weight(entries, codes, codes.removesuffix(end))
                used.update(found.parts, found.unused)
                yield found
        for name in sorted(entries.keys() - used):
            if name.endswith(ENDS):
                raise misfit(name, "does not belong to any weight that quantization_config describes")

    def _weight(self, entries: Entries, codes: str, stem: str) -> Quantised:
        name = f"{stem}.weight"
        part(entries, name, codes, [self._codes])
        scale = part(entries, name, f"{name}_scale", SCALE_TYPES)
        shape = shape_of(entries, codes)
        if len(shape) != 2:
            raise misfit(name, f"has shape {list(shape)}, but must be a matrix")
        packed = self._codes == "I32"
        if packed:
            shape = (shape[0], shape[1] * WORD // self._count)
        grid = shape_of(entries, scale)
        if self._sides is None:
            if grid not in ((), (1,), (1, 1)):
                raise misfit(name, f"requires a single scale, but {scale} has shape {list(grid)}")
            sides = shape
        else:
            sides = (self._sides[0], self._sides[1] or shape[1])
            if any(size % side for size, side in zip(shape, sides, strict=True)):
                raise misfit(name, f"has shape {list(shape)}, which is not divisible into groups of {list(sides)}")
            part(entries, name, scale, SCALE_TYPES, (shape[0] // sides[0], shape[1] // sides[1]))
        unused = tuple(n for n in (f"{stem}.input_scale", f"{stem}.input_zero_point") if n in entries)
        parts: tuple[str, ...] = (codes, scale)
        if packed:
            parts = (*parts, part(entries, name, f"{name}_shape", ["I64", "I32"], (2,)))
        experts = "experts" in stem.split(".")
        if experts and (self._codes == "I8" or (self._codes == "F8_E4M3" and sides[1] != shape[1])):
            raise ConfigurationError(
                f"{name} is an expert's weight in {self.title}, with scales of a kind that transformers does not load "
                "for experts; use a bfloat16 version of the model."
            )
        # transformers dequantises FP8 experts in float32, and all else in the dtype of the scales.
        exact = experts and self._codes == "F8_E4M3"

        def dequantise(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
            values, scales = parts[:2]
            if packed:
                if tuple(parts[2].tolist()) != shape:
                    raise misfit(name, f"has {name}_shape {parts[2].tolist()}, but codes for {list(shape)}")
                # They are stored with half their range added.
                values = (unpack(values, self._count) - 2 ** (self._count - 1)).to(torch.int8)
            scales = scales.float() if exact else scales
            factors = scales.reshape(1, 1) if self._sides is None else scales.repeat_interleave(sides[0], dim=0)
            factors = factors if self._sides is None else factors.repeat_interleave(sides[1], dim=1)
            return (values.to(scales.dtype) * factors).to(dtype)

        def kept(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
            codes, scales = parts
            return codes, scales.float().reshape(-1).expand(codes.shape[0]).contiguous()

        return Quantised(name, shape, parts, dequantise, unused, kept if self.keeps else None)


def _sides(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, 0 for all columns; None if the whole weight shares one."""
    strategy, group, block = (weights.get(key) for key in ("strategy", "group_size", "block_structure"))
    if strategy == "tensor":
        return None
    if strategy == "channel":
        return 1, 0
    if strategy == "group" and isinstance(group, int) and group > 0:
        return 1, group
    if strategy == "block" and isinstance(block, list) and len(block) == 2 and all(
        isinstance(n, int) and n > 0 for n in block
    ):  # fmt: skip
        return block[0], block[1]
    raise ConfigurationError(
        f"quantization_config: strategy {strategy} with group_size {group} and block_structure {block} is not "
        "supported; use a bfloat16 version of the model."
    )
