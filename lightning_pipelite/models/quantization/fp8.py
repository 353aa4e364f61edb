"""Holds the decoder's linear layers in FP8: e4m3 codes with a scale for each output channel.

One copy serves both the forward and the backward product, see :mod:`lightning_pipelite.kernels.fp8`. A transposed copy
can be held for the latter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Conv1D
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.fp8 import MULTIPLE, fp8_linear, has_fp8, transposed
from lightning_pipelite.kernels.fp8_rows import DTYPE, dequantise_rows, quantise_rows
from lightning_pipelite.models.quantization.four_bit import kept_names
from lightning_pipelite.models.transformers_compat import mark_initialised
from lightning_pipelite.shared.finite import not_finite

if TYPE_CHECKING:
    from lightning_pipelite.models.meta_model import MetaModel


class Fp8Linear(nn.Linear):
    """A frozen linear layer in FP8. A parameter assigned to ``weight``, as on loading, is quantised immediately.

    Args:
        linear: The layer on the meta device, linear or transformers' Conv1D, whose weight is transposed.
        name: Its name in the model.
        dtype: Dtype of the computation.
        device: Device that its weight will be on.

    Attributes:
        name: Its name in the model.
        dtype: Dtype of the computation.
        fits_fp8: Whether a device that has products in FP8 can compute its products so.
        in_fp8: Whether they are; if not, its weight is dequantised for each.
    """

    _first: tuple[Fp8Linear] | None = None  # the layer that holds this one's rows, see join; not a submodule
    _start = 0  # index of this layer's first row there

    def __init__(self, linear: nn.Linear | Conv1D, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.dtype, self._is_conv1d = name, dtype, isinstance(linear, Conv1D)
        shape = linear.weight.shape[::-1] if self._is_conv1d else linear.weight.shape
        super().__init__(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
        self.fits_fp8 = dtype == torch.bfloat16 and not any(size % MULTIPLE for size in shape)
        self.in_fp8 = self.fits_fp8 and has_fp8(device)
        self._parameters["weight"] = linear.weight  # type: ignore[assignment]
        self.bias = linear.bias
        self.requires_grad_(False)

    @property
    def codes(self) -> Tensor:
        """E4m3 [out, in], as bytes, so that nothing takes them for values to cast."""
        return self._rows("codes")

    @property
    def scales(self) -> Tensor:
        """Float32 [out]."""
        return self._rows("scales")

    def _rows(self, name: str) -> Tensor:
        held = self._holder()._parameters.get(name)
        if held is None:
            raise AttributeError(f"{self.name} has no {name} yet")
        return held if self._first is None else held.narrow(0, self._start, self.out_features)

    # Methods, as the compiler would check guards on properties in every call.

    def _holder(self) -> Fp8Linear:
        return self if self._first is None else self._first[0]

    def parts(self) -> list[Tensor]:
        """Return codes, scales and, if cached, the transposed codes, as kernels take them."""
        parts = [self._rows("codes").view(DTYPE), self._rows("scales")]
        cached = self._holder()._buffers.get("transposed_codes")
        if cached is not None:
            mine = cached if self._first is None else cached.narrow(1, self._start, self.out_features)
            parts.append(mine.view(DTYPE))
        return parts

    def joined(self) -> list[Tensor]:
        """Return the same for all layers whose rows this one holds, see :func:`join`."""
        codes, scales = (self._parameters[name] for name in ("codes", "scales"))
        assert codes is not None
        assert scales is not None
        cached = self._buffers.get("transposed_codes")
        return [codes.view(DTYPE), scales, *([] if cached is None else [cached.view(DTYPE)])]

    def _get_weight(self) -> Tensor:
        """Return the weight: on the meta device before loading, dequantised afterwards.

        Assigning to ``data`` of the dequantised weight, as PEFT does when it merges an adapter, raises an error.
        """
        if (weight := self._parameters.get("weight")) is not None:
            return weight
        whole = dequantise_rows(self.codes.view(DTYPE), self.scales, self.dtype)
        return whole if torch.compiler.is_compiling() else whole.as_subclass(_Dequantised)

    weight = property(_get_weight)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter) and not value.is_meta:
            self.quantise(value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> None:
        """Hold ``weight`` in FP8; on the meta device, hold meta tensors of the same sizes.

        Raises:
            ConfigurationError: It has values that are NaN or infinite.
        """
        if not_finite({self.name: weight}):
            raise self._not_finite()
        self._hold(*quantise_rows(weight.T.contiguous() if self._is_conv1d else weight))

    def keep(self, codes: Tensor, scales: Tensor) -> None:
        """Hold the given e4m3 codes [out, in] with float32 scales [out].

        Raises:
            ConfigurationError: They have values that are NaN or infinite.
        """
        not_a_number = (codes.view(torch.uint8) & 0x7F) == 0x7F
        if bool(not_a_number.any()) or not_finite({self.name: scales}):
            raise self._not_finite()
        self._hold(codes, scales)

    def _not_finite(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self.name}.weight holds values that are nan or infinite, so no training can start from it; repair the "
            "model's files."
        )

    def _hold(self, codes: Tensor, scales: Tensor) -> None:
        self._parameters.pop("weight", None)  # present only the first time
        for name, tensor in (("codes", codes.view(torch.uint8)), ("scales", scales)):
            if self._first is not None:
                self._rows(name).copy_(tensor)
                continue
            self._parameters[name] = parameter = nn.Parameter(tensor, requires_grad=False)
            mark_initialised(parameter)
        self._holder()._renew_transpose()

    def _renew_transpose(self) -> None:
        if "transposed_codes" in self._buffers:
            self.cache_transpose()

    def cache_transpose(self) -> None:
        """Hold a transposed copy of the codes too, for the backward product."""
        codes = self._parameters["codes"]
        assert codes is not None
        self.register_buffer("transposed_codes", transposed(codes), persistent=False)

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew_transpose()

    @override
    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move, but do not cast: products take the scales in float32, and they are so few that they cost nothing."""
        scales = self._parameters.get("scales")
        held = None if scales is None else scales.data
        super()._apply(fn, *args, **kwargs)
        scales = self._parameters.get("scales")
        if scales is not None and held is not None and scales.dtype != held.dtype:
            scales.data = held.to(scales.device)
        return self

    @override
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return fp8_linear(x, self.parts(), bias, in_fp8=self.in_fp8 and x.dtype == self.dtype)


def join(layers: Sequence[Fp8Linear]) -> None:
    """Make the first of several layers with the same input hold the codes and scales of all, contiguously.

    One product then serves all of them; each can still be called separately. Before :func:`cache_transposes`.
    """
    assert not any("transposed_codes" in layer._buffers for layer in layers)
    for name in ("codes", "scales"):
        held = torch.cat([layer._parameters.pop(name) for layer in layers])  # type: ignore[misc]
        layers[0]._parameters[name] = parameter = nn.Parameter(held, requires_grad=False)
        mark_initialised(parameter)
    start = 0
    for layer in layers:
        layer._first, layer._start = (layers[0],), start
        start += layer.out_features


class _Dequantised(Tensor):
    """A temporary, dequantised weight: changes to it would be lost."""

    # Results of operations on it are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """Its values."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ConfigurationError(
            "weights held by load_in_fp8 cannot be changed, so no adapter can be merged into them; save the adapter, "
            "and merge it into the model's own weights with pipelite merge."
        )


def hold_in_fp8(
    model: nn.Module, meta_model: MetaModel, numbers: Iterable[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Replace linear layers, still on the meta device, with FP8 ones.

    Args:
        model: The model, trimmed to the decoder layers ``numbers``.
        meta_model: The whole model.
        numbers: Indices of the decoder layers that ``model`` has.
        dtype: Dtype of the computation.
        device: Device that the weights will be on; if it is the meta device, they are quantised now, for their sizes.
    """
    names = [meta_model.layer_names[number] for number in numbers]
    kept = {*kept_names(model, names)}
    for layer_name in names:
        for name, module in list(model.get_submodule(layer_name).named_modules()):
            full = f"{layer_name}.{name}"
            if type(module) in (nn.Linear, Conv1D) and full not in kept:
                layer = Fp8Linear(module, full, dtype, device)
                if device.type == "meta":
                    layer.quantise(module.weight)
                model.set_submodule(full, layer)


def plan_products(model: nn.Module, has_products: bool) -> None:
    """Make layers on the meta device compute as on a device with or without products in FP8, whatever this one has."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.in_fp8 = layer.fits_fp8 and has_products


def cache_transposes(model: nn.Module) -> None:
    """Make layers whose products are computed in FP8 hold their codes transposed too, for the backward product."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear) and layer.in_fp8 and layer._holder() is layer:
            layer.cache_transpose()


def tell_how_computed(model: nn.Module, device: torch.device, *, transpose_cache: bool) -> None:
    """Warn in one sentence if products are not computed in FP8.

    Args:
        model: The model.
        device: Where it is.
        transpose_cache: Whether transposed copies are asked for, which only products in FP8 read.
    """
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    others = [layer for layer in layers if not layer.in_fp8]
    if not others or device.type == "meta":
        return
    if not has_fp8(device):
        reason = f"{device} does not support FP8 matrix products"
    elif others[0].dtype != torch.bfloat16:
        reason = "model.dtype is not bfloat16"
    else:
        reason = f"FP8 requires dimensions that are multiples of {MULTIPLE}, unlike those of {others[0].name}"
    which = "weights" if len(others) == len(layers) else f"{len(others)} of {len(layers)} weights"
    warnings.warn(
        f"load_in_fp8: {which} are dequantised before each product, which saves memory but not time: {reason}."
        + " fp8_transpose_cache keeps no transposed copies of them." * transpose_cache,
        stacklevel=2,
    )
