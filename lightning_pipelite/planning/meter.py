"""Measures what a computation takes by running it on the meta device, where tensors have no memory."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_pipelite.kernels import combine, experts, fp8, fp8_rows, grouped_outer, grouped_product, lora
from lightning_pipelite.models.attention import flash
from lightning_pipelite.models.trace import tensors_in
from lightning_pipelite.planning.products import flops, is_product

BLOCK = 512  # bytes: the CUDA allocator rounds up to multiples of it
ATEN = torch.ops.aten
FREE = ("aten::empty", "aten::_unsafe_view")  # operations that move no bytes, besides views
_simple: set[Any] = set()  # operations that do not decompose, cached as torch looks this up each time


class _Held:
    """Memory that is held as long as this object lives."""

    def __init__(self, meter: Meter, size: int) -> None:
        self._meter, self.size = meter, size
        meter.live += size
        meter.peak = max(meter.peak, meter.live)

    def __del__(self) -> None:
        self._meter.live -= self.size


class Meter(TorchDispatchMode):
    """Tracks every tensor from its creation until its storage is freed, and adds up the work of the operations.

    On the meta device this gives the memory that the same computation takes on a GPU, except what kernels allocate
    internally; large allocations of that kind are in :data:`WORKSPACES`. If the computation reads a value, which the
    meta device does not have, it gets 0.

    While :attr:`fused` is set, operations count as compiled: matrix products and attention run as they are. The tensors
    between them take no memory of their own, but keep alive the results that they are computed from, as the compiler
    saves these for the backward pass and recomputes the rest (``torch._functorch.partitioners``). Such a tensor is
    materialised for a product that reads it, and where the compiled part ends.

    Args:
        device: The type of the device whose tensors are counted: "meta", or "cpu" in the tests.

    Attributes:
        live: Bytes of the tensors that are held.
        peak: The most bytes since :meth:`mark`.
        fused: Whether operations count as compiled.
        flops: Floating-point operations of matrix products and attention, by element size in bytes.
        moved: Bytes read and written by all other operations.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.live = self.peak = 0
        self.fused = False
        self.moved = 0
        self.flops: dict[int, float] = {}
        self._device = device
        self._known: weakref.WeakKeyDictionary[Any, frozenset[_Held]] = weakref.WeakKeyDictionary()
        self._real: weakref.WeakSet[Any] = weakref.WeakSet()

    def mark(self) -> int:
        """Return the peak since the last mark, and start a new one."""
        peak, self.peak = self.peak, self.live
        return peak

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors as materialised: those made outside, and those where a compiled part ends."""
        for tensor in tensors:
            if tensor.device.type == self._device:
                storage = tensor.untyped_storage()
                if storage not in self._real:
                    self._real.add(storage)
                    self._known[storage] = frozenset([_Held(self, _size(storage))])

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is ATEN._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func not in _simple:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
                with self:  # a composite operation
                    output = func.decompose(*args, **kwargs)
                if output is not NotImplemented:
                    return output
            _simple.add(func)
        name = func._schema.name
        given = [t for t in tensors_in((args, kwargs)) if t.device.type == self._device]
        ours = name in OURS
        counted = not ours and is_product(func)
        product = counted or ours
        if product and self.fused:
            self._read(given)
        if name in READ:
            self.moved += READ[name](*args)
        if name in WORKSPACES:
            self.peak = max(self.peak, self.live + WORKSPACES[name](*args))
        if ours:  # run the body to count what it does; its meta kernel would only give shapes
            fused, self.fused = self.fused, False
            with self:
                output = OURS[name](*args, **kwargs)
            self.fused = fused
            return output
        output = func(*args, **kwargs)
        made = [t for t in tensors_in(output) if t.device.type == self._device]
        if counted:
            width, count = flops(func, args, kwargs, output)
            self.flops[width] = self.flops.get(width, 0.0) + count
        if self.fused and not product:
            self._derive(given, made)
            return output
        if not product and made and not func.is_view and not name.startswith(FREE):
            self.moved += sum(t.numel() * t.element_size() for t in (*given, *made))
        self.hold(*(t for t in made if t.untyped_storage() not in self._known))  # no views of unmaterialised ones
        return output

    def _read(self, given: list[Tensor]) -> None:
        """Materialise what a product reads.

        It stays materialised: the compiler does not recompute what a product reads in the backward pass (the option
        ``ban_recompute_materialized_backward`` of its partitioner), and products save their inputs for their own.
        """
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage in self._known and storage not in self._real:
                self.moved += _size(storage) + sum(held.size for held in self._known[storage])
                self.hold(tensor)

    def _derive(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Make tensors between products keep alive the results that they are computed from."""
        sources = frozenset(held for t in given for held in self._known.get(t.untyped_storage(), ()))
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = sources


def _size(storage: Any) -> int:
    return -(-int(storage.nbytes()) // BLOCK) * BLOCK


def _flash_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Return what FlashAttention 2's backward pass allocates (flash_api.cpp, mha_varlen_bwd).

    The query's gradient in float32 and, for grouped heads, a key and a value gradient for each query head.
    """
    workspace = 4 * query.numel()
    if query.shape[-2] != key.shape[-2]:
        workspace += 2 * query.element_size() * query.shape[-2] * (key.numel() // key.shape[-2])
    return workspace


OURS: dict[str, Callable[..., Any]] = {
    "pipelite::lora_linear": lora.forward_operation,
    "pipelite::lora_linear_backward": lora.backward_operation,
    "pipelite::fp8_product": fp8.product_operation,
    "pipelite::fp8_cast_rows": fp8_rows.cast_operation,
    "pipelite::grouped_product": grouped_product.product_operation,
    "pipelite::grouped_product_4bit": experts.product_4bit_operation,
    "pipelite::grouped_outer": grouped_outer.outer_operation,
    "pipelite::sum_copies": combine.sum_operation,
    "pipelite::weigh": combine.weigh_operation,
    "pipelite::sink_attention": flash.forward_operation,
    "pipelite::sink_attention_backward": flash.backward_operation,
}
"""Operations of this package whose bodies are measured, instead of a formula in ``products.py``."""


READ: dict[str, Callable[..., int]] = {
    "pipelite::grouped_product": lambda x, weight, *_: weight.numel() * weight.element_size(),
}
"""Bytes of weights whose reading bounds products of few rows each, by the name of the operation.

Each expert's weight is read for just the tokens routed to it; a single weight's product takes longer than reading it.
"""


WORKSPACES: dict[str, Callable[..., int]] = {
    "torch_attn::_varlen_attn": lambda *_: 0,
    "torch_attn::_varlen_attn_backward": _flash_backward,
}
"""Bytes that kernels allocate internally, by the name of the operation."""


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Make the meta device run scaled dot-product attention as a GPU does, and accept autocast.

    By default it uses plain products, which save a matrix of sequence x sequence, and refuses autocast, which PEFT
    turns off for fused experts. Not a TorchFunctionMode, as none is active during recomputation in the backward pass.
    """
    before, autocast = nn.functional.scaled_dot_product_attention, torch.autocast

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _attention(query, *args, **kwargs) if query.is_meta else before(query, *args, **kwargs)

    def on_gpu(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cuda" if device_type == "meta" else device_type, *args, **kwargs)

    nn.functional.scaled_dot_product_attention = attention
    torch.autocast = on_gpu  # type: ignore[assignment, misc]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="User provided device_type of 'cuda'")
            yield
    finally:
        nn.functional.scaled_dot_product_attention = before
        torch.autocast = autocast  # type: ignore[misc]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and query.shape[1] != key.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    output = ATEN._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    first: Tensor = output[0]
    return first
