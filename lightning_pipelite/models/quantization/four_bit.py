"""Quantises weights to 4 bits (nf4): linear layers as transformers does, and the fused experts that it leaves out.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import BitsAndBytesConfig, Conv1D
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.nf4 import BLOCK, SCALES_BLOCK, bitsandbytes_operations
from lightning_pipelite.models.transformers_compat import mark_initialised
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

if TYPE_CHECKING:
    # At run time it is imported where it is used: bitsandbytes imports torch's compiler, which takes two seconds.
    from bitsandbytes.nn import Linear4bit

    from lightning_pipelite.models.meta_model import MetaModel

SMALLEST_SIDE = 64  # a fused weight with a smaller side is a filter or a scale, and a block of nf4 has 64 values
COMPUTED_WITH = re.compile(r"\bself\.(\w+)\.weight(?:\.(?!dtype\b|device\b|shape\b)\w|\s*@)")
ROUTER = re.compile(r"router|gate|\w+_(router|gate)")  # not gate_proj


def kept_names(model: nn.Module, layer_names: Iterable[str]) -> list[str]:
    """Return the linear layers of the named decoder layers that keep their precision.

    Routers and expert gates are small but decisive; in most classes they are not linear layers, and this finds those
    that are. Weights that a class computes with directly, without calling the layer, must stay floating point.
    """
    kept = []
    for layer_name in layer_names:
        computed_with: set[str] = set()
        for name, module in model.get_submodule(layer_name).named_modules():
            if isinstance(module, nn.Linear):
                if name in computed_with or any(ROUTER.fullmatch(part) for part in name.split(".")):
                    kept.append(f"{layer_name}.{name}")
            else:
                kind: Any = type(module)
                computed_with |= {f"{name}.{child}".removeprefix(".") for child in _computed_with(kind)}
    return kept


@cache
def _computed_with(kind: type) -> frozenset[str]:
    """Return the names of the layers of a module whose weights the code of its class computes with directly.

    Examples are Gemma 3n's coefficients, which it clamps, and Jamba's dt_proj.
    """
    found: set[str] = set()
    for each in kind.__mro__:
        if not each.__module__.startswith("torch."):
            with contextlib.suppress(OSError, TypeError):  # a class without a source file
                found |= set(COMPUTED_WITH.findall(inspect.getsource(each)))
    return frozenset(found)


def linear_names(model: nn.Module, layer_names: Iterable[str]) -> list[str]:
    """Return all linear layers of the named decoder layers."""
    return [
        f"{layer_name}.{name}"
        for layer_name in layer_names
        for name, module in model.get_submodule(layer_name).named_modules()
        if isinstance(module, nn.Linear)
    ]


def unknown_linear(model: nn.Module, layer_names: Iterable[str]) -> str | None:
    """Return the name of a linear layer that transformers would silently leave unquantised, or None."""
    layer_names = list(layer_names)
    kept = set(kept_names(model, layer_names))
    for layer_name in layer_names:
        for name, module in model.get_submodule(layer_name).named_modules():
            full = f"{layer_name}.{name}"
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear and full not in kept:
                return full
    return None


def nf4(kept: list[str], dtype: torch.dtype, *, double_quant: bool) -> BitsAndBytesConfig:
    """Return the quantisation configuration for all linear layers but those ``kept``, computed in ``dtype``.

    With ``double_quant`` the scales of the blocks are quantised too, to 8 bits.

    ``kept`` must name the head: by default, transformers takes a model's last module for it, which in a trimmed model
    belongs to a decoder layer.
    """
    bitsandbytes_operations()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=[rf"{re.escape(name)}$" for name in kept],
    )


def kernel_parts(codes: Tensor, state: Any) -> list[Tensor] | None:
    """Return a weight as kernels take it, see :func:`~lightning_pipelite.kernels.nf4.dequantise`.

    Args:
        codes: Bitsandbytes' codes.
        state: Their ``QuantState``.

    Returns:
        The parts; None if the format is not nf4 in blocks of the usual size.

    Raises:
        ConfigurationError: The codes are not bytes: bitsandbytes can store them in other dtypes.
    """
    if state is None or state.quant_type != "nf4" or state.blocksize != BLOCK:
        return None
    if codes.dtype != torch.uint8:
        raise ConfigurationError(
            f"the codes of an nf4 weight are in {codes.dtype}; leave out bnb_4bit_quant_storage, or set it to uint8."
        )
    parts = [codes, state.absmax]
    return [*parts, state.state2.absmax, state.state2.code, state.offset] if state.nested else parts


def held_parts(parts: Sequence[Tensor]) -> dict[int, nn.Parameter]:
    """Return the parts of a frozen weight as a compiled module should hold them.

    The compiler guards tensors that are not plain parameters, lists, and objects that are not modules, and checks these
    guards in every call; for bitsandbytes' codes and states this takes the host longer than a small product.
    """
    return dict(enumerate(nn.Parameter(part.detach().as_subclass(Tensor), requires_grad=False) for part in parts))


def in_order(parts: Mapping[int, Tensor]) -> list[Tensor]:
    """Return the parts that :func:`held_parts` holds, as kernels take them."""
    return [parts[number] for number in range(len(parts))]


def join(weights: Sequence[Any]) -> list[Tensor] | None:
    """Store several nf4 weights contiguously, and return their parts as those of one weight.

    Each weight keeps its values and becomes a view of the joint storage.

    Args:
        weights: Bitsandbytes' ``Params4bit`` [out, in], with the same number of columns.

    Returns:
        The joint parts; None, with the weights unchanged, if one ends within a block that shares a scale or if they are
        quantised in different ways.
    """
    states: list[Any] = [getattr(weight, "quant_state", None) for weight in weights]
    parts = [kernel_parts(weight.data, state) for weight, state in zip(weights, states, strict=True)]
    if any(each is None or len(each) != len(parts[0] or ()) for each in parts):
        return None
    codes, scales, *nested = zip(*(each for each in parts if each is not None), strict=True)
    step = BLOCK * SCALES_BLOCK if nested else BLOCK
    tables = [] if not nested or codes[0].is_meta else nested[1]
    if any(state.shape.numel() % step for state in states) or any(not torch.equal(tables[0], each) for each in tables):
        return None
    joined = [_on_end(codes, weights, "data"), _on_end(scales, states, "absmax")]
    if nested:
        outer, values, offsets = nested
        added = [offset.reshape(1).expand(len(each)) for offset, each in zip(offsets, outer, strict=True)]
        joined += [_on_end(outer, [state.state2 for state in states], "absmax"), values[0], torch.cat(added)]
    return joined


def _on_end(tensors: Sequence[Tensor], holders: Sequence[Any], name: str) -> Tensor:
    """Return the concatenated tensors, with each holder's attribute ``name`` set to its part of the result."""
    whole = torch.cat([*tensors])
    for holder, part in zip(holders, whole.split([len(each) for each in tensors]), strict=True):
        setattr(holder, name, part)
    return whole


def fused_weights(layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the weights that hold many experts in one tensor [experts, ., .], each as its module and its name there."""
    for module in (module for layer in layers for module in layer.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            matrix = parameter.ndim == 3 and min(parameter.shape[1:]) >= SMALLEST_SIDE
            if matrix and not isinstance(module, nn.modules.conv._ConvNd):
                yield module, name


def quantise_on_load(layers: Iterable[nn.Module], *, double_quant: bool) -> None:
    """Make the fused weights of ``layers``, still on the meta device, be quantised to nf4 as each is loaded."""
    for module, name in list(fused_weights(layers)):
        if not isinstance(module, _QuantisedOnLoad):
            mix_in(module, _QuantisedOnLoad).__dict__.update(fused_names=set(), double_quant=double_quant)
        module.fused_names.add(name)  # type: ignore[operator, arg-type]


def quantise_without_weights(
    model: nn.Module,
    meta_model: MetaModel,
    numbers: Iterable[int],
    dtype: torch.dtype,
    *,
    double_quant: bool,
    only: Collection[str] | None = None,
) -> None:
    """Give a model on the meta device the 4-bit tensors that a real one gets by quantisation on loading.

    Args:
        model: The model, trimmed to the decoder layers ``numbers``.
        meta_model: The whole model.
        numbers: Indices of the decoder layers that ``model`` has.
        dtype: Dtype of the computation.
        double_quant: Whether to quantise the scales of the blocks too.
        only: The linear layers that are in 4 bits; None if all are.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    names = [meta_model.layer_names[number] for number in numbers]
    kept = {*kept_names(model, names)}
    with _code_tables_of_its_own():
        for layer_name in names:
            for name, module in list(model.get_submodule(layer_name).named_modules()):
                full = f"{layer_name}.{name}"
                if type(module) in (nn.Linear, Conv1D) and full not in kept and (only is None or full in only):
                    model.set_submodule(full, _linear_without_weights(module, dtype, double_quant))
        for module, name in list(fused_weights(model.get_submodule(name) for name in names)):
            replace_parameter_4bit(module, name, quant_type="nf4", compress_statistics=double_quant)


@contextlib.contextmanager
def _code_tables_of_its_own() -> Iterator[None]:
    """Leave bitsandbytes' global tables of codes unchanged.

    It makes the table for double quantisation on the device where it is first needed, and keeps it for good: on the
    meta device it would have no values, and no more weights could be quantised. Remove when it makes one per device.
    """
    from bitsandbytes.functional import name2qmap

    tables = dict(name2qmap)
    name2qmap.clear()
    try:
        yield
    finally:
        name2qmap.clear()
        name2qmap.update(tables)


def _linear_without_weights(linear: nn.Linear | Conv1D, dtype: torch.dtype, double_quant: bool) -> Linear4bit:
    from bitsandbytes.nn import Linear4bit

    weight = linear.weight.mT if isinstance(linear, Conv1D) else linear.weight
    quantised = Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    quantised.weight.data = weight.data.contiguous()
    quantised.weight._quantize(torch.device("meta"))
    quantised.bias = linear.bias
    return quantised.requires_grad_(False)


def keep_trainable(model: nn.Module) -> None:
    """Keep an evaluation on a CPU from changing the weights.

    On some CPUs, the first evaluation makes bitsandbytes (0.50) repack them, for good, into a form whose product has no
    backward: from then on most gradients would be wrong, with only a warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def linear_as_stored(linear: nn.Linear, codes: Tensor, state: Any, dtype: torch.dtype) -> Linear4bit:
    """Return a linear layer with the given codes.

    Args:
        linear: The layer that it replaces; its weight is not read.
        codes: Bitsandbytes' codes, one column of bytes.
        state: Their ``QuantState``.
        dtype: Dtype of the computation.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    bitsandbytes_operations()
    state.dtype = dtype  # dequantised to it directly, as weights quantised here are; else they would be rounded twice
    made = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type=state.quant_type,
        device="meta",
    )  # fmt: skip
    made.weight = Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        module=made,
        bnb_quantized=True,
    )
    made.quant_state, made.bias = state, linear.bias
    return made.requires_grad_(False)


class _QuantisedOnLoad(Mixin, nn.Module):
    """Mixed into a module with fused weights: quantises them as they are assigned.

    Quantised after loading, all experts of a stage would be held in full precision at once.
    """

    mixin_place = MixinPlace.QUANTISATION
    fused_names: set[str]
    double_quant: bool

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        super().__setattr__(name, value)
        loaded = isinstance(value, nn.Parameter) and value.is_floating_point() and not value.is_meta
        if loaded and name in self.fused_names and not is_parametrized(self, name):
            replace_parameter_4bit(self, name, quant_type="nf4", compress_statistics=self.double_quant)
            # So that transformers does not report the weight as missing from the files.
            mark_initialised(self.get_parameter(f"parametrizations.{name}.original"))
