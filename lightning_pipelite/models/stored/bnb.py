"""Bitsandbytes: linear layers in 4 bits (nf4, fp4) with a scale per block, or in 8 bits with one per row.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (https://arxiv.org/abs/2305.14314), and 2022,
"LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.nf4 import SCALES_BLOCK, bitsandbytes_operations
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

TYPES = ["nf4", "fp4"]
STATE = ".quant_state.bitsandbytes__"
ENDS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""The dtypes that 4-bit codes may be stored as, with their sizes in bytes; each byte holds two codes."""
KNOWN: dict[str, list[Any]] = {
    "quant_type": TYPES,
    "blocksize": [32, 64, 128, 256, 512, 1024, 2048, 4096],
    "dtype": ["bfloat16", "float16", "float32"],
    "nested_blocksize": [SCALES_BLOCK],
    "nested_dtype": ["float32"],
}
ROWS = 0  # the layout of 8-bit codes that is not specific to a kind of GPU


class BitsAndBytes:
    """Codes ``NAME``, described by ``NAME.absmax``, ``NAME.quant_map`` and ``NAME.quant_state.bitsandbytes__nf4``;
    in 8 bits codes ``NAME`` [out, in] and ``SCB`` [out], 127 times the scales.

    Args:
        config: The ``quantization_config``.

    Attributes:
        double_quant: Whether the scales of blocks are quantised too.
    """  # noqa: D205

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = ("skip_modules", "threshold", "has_fp16_weight", "enable_fp32_cpu_offload")
        refuse_unknown(
            config,
            {
                **{f"{lead}load_in_{bits}bit": [True, False] for lead in ("", "_") for bits in (4, 8)},
                "bnb_4bit_quant_type": TYPES,
                "bnb_4bit_use_double_quant": [True, False],
                "bnb_4bit_compute_dtype": None,
                "bnb_4bit_quant_storage": None,
                **dict.fromkeys(f"llm_int8_{name}" for name in settings),  # the files show what is quantised
            },
        )
        four, eight = (bool(config.get(key) or config.get(f"_{key}")) for key in ("load_in_4bit", "load_in_8bit"))
        if four == eight:
            raise ConfigurationError(
                "quantization_config sets neither or both of load_in_4bit and load_in_8bit; fetch config.json again."
            )
        self._type = config.get("bnb_4bit_quant_type", "fp4") if four else "int8"
        self.double_quant = four and bool(config.get("bnb_4bit_use_double_quant"))
        self.bits = 8.0 if eight else 4 + (8 if self.double_quant else 32) / 64
        self.title = f"bitsandbytes {self._type}"
        self.keeps: Keeps | None = "load_in_4bit" if four else None

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights."""
        used: set[str] = set()
        for name in entries:
            if self.keeps and name.endswith(STATE + self._type):
                found = _four_bits(entries, name.removesuffix(STATE + self._type), name, read)
            elif not self.keeps and name.endswith(".SCB"):
                found = _eight_bits(entries, name)
            else:
                continue
            used.update(found.parts, found.unused)
            yield found
        for name in sorted(entries.keys() - used):
            if STATE in name or name.endswith(ENDS):
                raise misfit(name, f"does not belong to any weight in {self.title}")
            if name.endswith(".weight") and entries[name]["dtype"] in ("U8", "I8"):
                raise misfit(name, "lacks the tensors that describe its codes")


def _four_bits(entries: Entries, name: str, described: str, read: Read) -> Quantised:
    part(entries, name, described, ["U8"])
    state = _state(name, described, read)
    shape, nested = tuple(state["shape"]), "nested_offset" in state
    blocks = -(-math.prod(shape) // state["blocksize"])
    stored = entries[part(entries, name, name, STORAGE)]
    if math.prod(stored["shape"]) * STORAGE[stored["dtype"]] != -(-math.prod(shape) // 2):
        raise misfit(name, f"has codes of shape {stored['shape']}, but {described} gives {list(shape)}")
    parts = [
        name,
        part(entries, name, f"{name}.absmax", ["U8" if nested else "F32"], (blocks,)),
        part(entries, name, f"{name}.quant_map", ["F32"], (16,)),
    ]
    if nested:
        parts.append(part(entries, name, f"{name}.nested_absmax", ["F32"], (-(-blocks // SCALES_BLOCK),)))
        parts.append(part(entries, name, f"{name}.nested_quant_map", ["F32"], (256,)))

    def kept(parts: list[Tensor]) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import QuantState, get_4bit_type

        keys = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        found = QuantState.from_dict({**state, **dict(zip(keys, parts[1:], strict=False))}, parts[0].device)
        if not torch.equal(found.code, get_4bit_type(state["quant_type"], device=parts[0].device)):
            raise misfit(name, f"has values in {name}.quant_map that are not those of {state['quant_type']}")
        return parts[0].contiguous().view(torch.uint8).reshape(-1, 1), found

    def dequantise(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return _dequantised(*kept(parts)).to(dtype)

    return Quantised(name, shape, tuple(parts), dequantise, (described,), kept)


def _dequantised(codes: Tensor, state: Any) -> Tensor:
    """Return the weight in the dtype that its state names."""
    from bitsandbytes.functional import dequantize_4bit

    bitsandbytes_operations()
    weight: Tensor = dequantize_4bit(codes, state)
    return weight


def _state(name: str, described: str, read: Read) -> dict[str, Any]:
    """Return the checked description of the codes that is stored beside their tensors."""
    try:
        state = json.loads(bytes(read(described).tolist()))
        shape, unknown = state["shape"], state.keys() - {*KNOWN, "shape", "nested_offset"}
        nested = {key for key in state if key.startswith("nested_")}
        whole = {"quant_type", "blocksize", "dtype"} <= state.keys() and len(nested) in (0, 3)
        usable = whole and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
        usable = usable and math.isfinite(state.get("nested_offset", 0.0)) and described.endswith(state["quant_type"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise misfit(name, f"has a tensor {described} that cannot be read") from None
    strange = {
        key for key, values in KNOWN.items() if key in state and (type(state[key]), state[key]) not in _typed(values)
    }
    if unknown or strange:
        key = min(unknown | strange)
        raise ConfigurationError(
            f"the quantised weight {name} has {key} {state[key]!r}, which is not supported; use a bfloat16 version of "
            "the model."
        )
    if not usable:
        raise misfit(name, f"has a tensor {described} that does not describe its codes")
    return dict(state)


def _typed(values: list[Any]) -> list[tuple[type, Any]]:
    return [(type(value), value) for value in values]


def _eight_bits(entries: Entries, scales: str) -> Quantised:
    stem = scales.removesuffix(".SCB")
    name, layout = f"{stem}.weight", f"{stem}.weight_format"
    part(entries, name, name, ["I8"])
    shape = shape_of(entries, name)
    if len(shape) != 2:
        raise misfit(name, f"has shape {list(shape)}, but must be a matrix")
    parts: tuple[str, ...] = (name, part(entries, name, scales, ["F32"], shape[:1]))
    if layout in entries:
        parts = (*parts, part(entries, name, layout, ["U8"]))

    def dequantise(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        if len(parts) > 2 and bool((parts[2] != ROWS).any()):
            raise ConfigurationError(
                f"the quantised weight {name} is laid out for one kind of GPU ({layout}), which is not supported; use "
                "a bfloat16 version of the model."
            )
        weight: Tensor = int8_vectorwise_dequant(parts[0], parts[1])
        return weight.to(dtype)

    return Quantised(name, shape, parts, dequantise)
