"""Counts the floating-point operations of products, and lists the operations that are not products.

What a plan does not count is free to it. So each operation must either have a formula or be known not to be a product:
operations of libraries and of this package that do arithmetic must be entered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_pipelite.models.trace import tensors_in

ATEN = torch.ops.aten
IN_PLACE = {ATEN.addmm_: ATEN.addmm, ATEN.baddbmm_: ATEN.baddbmm}  # torch has no formulas for these


def _causal(query: Tensor, value: Tensor) -> float:
    """Return the operations of two products over half the pairs of tokens, as if all were one document.

    This is the maximum.
    """
    tokens, heads, size = query.shape
    return float(tokens) ** 2 * heads * (size + value.shape[-1])


def _grouped(left: Tensor, right: Tensor, *_: Any) -> float:
    """Return the operations of a grouped product: the dimension cut into groups counts once, whatever the bounds.

    Rows [tokens, in] by [groups, in, out]; [groups, out, in] by columns [in, tokens]; [out, tokens] by [tokens, in],
    summed over each group; or a batch of products.
    """
    columns = right.shape[-1]
    groups = left.shape[0] if left.ndim == 3 and right.ndim == 2 else 1
    return 2.0 * (left.numel() // groups) * columns


def _control(delta: Tensor, directions: Tensor, products: int) -> float:
    """Return the operations of products with Q.

    The kernel splits Q into three bfloat16 summands if Q is float32 and d is bfloat16.
    """
    summands = 3 if delta.dtype == torch.bfloat16 and directions.dtype == torch.float32 else 1
    return 2.0 * products * summands * delta.numel() * directions.shape[-1]


FORMULAS: dict[str, Callable[..., float]] = {
    "aten::_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "transformers::grouped_mm_fallback_backward": lambda rows, weights, *_: 2 * _grouped(rows, weights),
    "aten::dot": lambda left, right: 2.0 * left.numel(),
    "aten::mv": lambda matrix, vector: 2.0 * matrix.numel(),
    "aten::addmv": lambda base, matrix, vector: 2.0 * matrix.numel(),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda query, key, value, *_: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda gradient, query, key, value, *_: (
        sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
    ),
    # Over packed documents: their lengths are values, which the meta device does not have.
    "torch_attn::_varlen_attn": lambda query, key, value, *_: _causal(query, value),
    # Five products, where the forward pass has two.
    "torch_attn::_varlen_attn_backward": lambda gradient, query, key, value, *_: 2.5 * _causal(query, value),
    # For few tokens; for more, bitsandbytes dequantises first.
    "bitsandbytes::gemm_4bit": lambda rows, codes, shape, *_: 2.0 * rows.numel() * shape[0],
    "pipelite::control": lambda output, delta, directions, *_: _control(delta, directions, 2),
    "pipelite::control_backward": lambda gradient, delta, directions, scales, classes, to_delta: _control(
        delta, directions, 5 if to_delta else 4
    ),
}
"""Formulas by the name of the operation; called with its arguments."""

NO_PRODUCTS = {
    "bitsandbytes::dequantize_4bit",
    "bitsandbytes::dequantize_blockwise",
    "bitsandbytes::quantize_4bit",
    "bitsandbytes::quantize_blockwise",
    "pipelite::sort_by_expert",
    "aten::linalg_vector_norm",
    "aten::linalg_cross",
}
"""Operations that only pass over their operands: of libraries, of this package, and of torch if their names suggest
otherwise."""

ENDS = ("mm", "mv", "gemm", "matmul", "dot", "einsum", "linear", "attention", "attn")
BEGINNINGS = ("conv", "linalg", "lstm", "gru", "rnn", "matmul", "fft")
WORDS = {"outer", "inner", "ger", "addr", "kron", "cdist", "sdpa"}


def is_product(func: Any) -> bool:
    """Return whether the arithmetic of an operation counts, that is, whether it has a formula.

    Raises:
        UnknownProductError: If it has none and is not known not to be a product.
    """
    name: str = func._schema.name
    if name in FORMULAS or _torchs(func) is not None:
        return True
    if name not in NO_PRODUCTS and _may_be_product(name):
        raise UnknownProductError(f"the number of operations of {name} is not known; add it to products.py")
    return False


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[int, float]:
    """Return the element size of a product in bytes, and the number of its floating-point operations."""
    tensors = [t for t in tensors_in(args) if t.is_floating_point()]
    width = min((t.element_size() for t in tensors), default=4)
    if (formula := FORMULAS.get(func._schema.name)) is not None:
        return width, float(formula(*args))
    kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, torch.dtype)}
    few = args[:2] if func._overloadpacket in (ATEN.mm, ATEN.bmm) else args
    return width, float(_torchs(func)(*few, **kwargs, out_val=output))


class UnknownProductError(NotImplementedError):
    """Raised for an operation whose number of floating-point operations is not known."""


def _torchs(func: Any) -> Any:
    return flop_registry.get(IN_PLACE.get(func._overloadpacket, func._overloadpacket))


def _may_be_product(name: str) -> bool:
    library, _, operation = name.partition("::")
    if library == "prims":  # torch's primitives, elementwise and reductions
        return False
    if library != "aten":  # any operation of a library of kernels
        return True
    return any(w.endswith(ENDS) or w.startswith(BEGINNINGS) or w in WORDS for w in operation.split("_"))
