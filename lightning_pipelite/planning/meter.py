"""What a computation takes, found out by running it: on the meta device, where tensors have no memory."""

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

from lightning_pipelite.kernels import combine, experts, fp8, grouped_outer, grouped_product, lora
from lightning_pipelite.models.attention import flash
from lightning_pipelite.models.trace import tensors_in
from lightning_pipelite.planning.products import flops, is_product

BLOCK = 512  # bytes: the CUDA allocator gives out multiples of it
ATEN = torch.ops.aten
FREE = ("aten::empty", "aten::_unsafe_view")  # what moves no bytes, beside views
_simple: set[Any] = set()  # operations that are not made of others: torch looks that up anew each time


class _Held:
    """Memory that is taken as long as this object lives."""

    def __init__(self, meter: Meter, size: int) -> None:
        self._meter, self.size = meter, size
        meter.live += size
        meter.peak = max(meter.peak, meter.live)

    def __del__(self) -> None:
        self._meter.live -= self.size


class Meter(TorchDispatchMode):
    """Follows every tensor from when it is made until its storage is freed, and adds up what the operations do.

    On the meta device this is the memory that the same computation takes on a GPU but for what kernels allocate for
    themselves, of which the large ones are in :data:`WORKSPACES`. Where a computation asks for a value, as the
    meta device has none, it is told 0.

    While :attr:`fused` is set it follows what is compiled: matrix products and attention run as they are; what lies
    between them takes no memory of its own, but keeps the results that it is computed from, as the compiler keeps these
    for the backward pass and computes the rest anew (``torch._functorch.partitioners``). It is made real for a product
    that reads it, and where the compiled part ends.

    Args:
        device: The type of the device whose tensors are counted: "meta", or "cpu" in the tests.

    Attributes:
        live: Bytes of the tensors that are held.
        peak: The most bytes since :meth:`mark`.
        fused: Whether what runs is compiled.
        flops: Floating-point operations of the matrix products and of attention, by the size of their elements in
            bytes.
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
        """Return the peak since the last mark, and begin a new one."""
        peak, self.peak = self.peak, self.live
        return peak

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors as real: those made outside, and where a compiled part ends."""
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
                with self:  # an operation that is only made of others
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
        if ours:  # count what an operation of ours does within, where its shapes alone would do
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
        self.hold(*(t for t in made if t.untyped_storage() not in self._known))  # not a view of what is not real
        return output

    def _read(self, given: list[Tensor]) -> None:
        """Make real what a product reads.

        For good: the compiler does not compute anew what a product reads in the backward pass (the option
        ``ban_recompute_materialized_backward`` of its partitioner), and products keep for theirs what they read.
        """
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage in self._known and storage not in self._real:
                self.moved += _size(storage) + sum(held.size for held in self._known[storage])
                self.hold(tensor)

    def _derive(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Let what lies between products keep the results that it is computed from."""
        sources = frozenset(held for t in given for held in self._known.get(t.untyped_storage(), ()))
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = sources


def _size(storage: Any) -> int:
    return -(-int(storage.nbytes()) // BLOCK) * BLOCK


def _flash_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Return what FlashAttention 2's backward pass allocates (flash_api.cpp, mha_varlen_bwd).

    The query's gradient in float32; and for grouped heads a key and a value gradient for each query head.
    """
    workspace = 4 * query.numel()
    if query.shape[-2] != key.shape[-2]:
        workspace += 2 * query.element_size() * query.shape[-2] * (key.numel() // key.shape[-2])
    return workspace


OURS: dict[str, Callable[..., Any]] = {
    "pipelite::lora_linear": lora.forward_operation,
    "pipelite::lora_linear_backward": lora.backward_operation,
    "pipelite::fp8_product": fp8.product_operation,
    "pipelite::grouped_product": grouped_product.product_operation,
    "pipelite::grouped_product_4bit": experts.product_4bit_operation,
    "pipelite::grouped_outer": grouped_outer.outer_operation,
    "pipelite::sum_copies": combine.sum_operation,
    "pipelite::weigh": combine.weigh_operation,
    "pipelite::sink_attention": flash.forward_operation,
    "pipelite::sink_attention_backward": flash.backward_operation,
}
"""Operations of this package that are looked into, in place of a formula in ``products.py``."""


READ: dict[str, Callable[..., int]] = {
    "pipelite::grouped_product": lambda x, weight, *_: weight.numel() * weight.element_size(),
}
"""Bytes of weights that products of few rows each wait for, by the name of the operation.

Each expert's weight is read for the tokens that come to it; a single weight's product takes longer than its reading.
"""


WORKSPACES: dict[str, Callable[..., int]] = {
    "torch_attn::_varlen_attn": lambda *_: 0,
    "torch_attn::_varlen_attn_backward": _flash_backward,
}
"""What kernels allocate for themselves, in bytes, by the name of the operation."""


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let the meta device compute scaled dot-product attention by what a GPU computes it by, and know autocast.

    Left alone, it takes the plain products, which keep a matrix of sequence x sequence. Not a TorchFunctionMode: none
    is active in what the backward pass computes again. Autocast, which PEFT turns off for fused experts, it refuses.
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
