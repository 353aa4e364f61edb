"""Checks, before any weight is read, whether the base weights of a model can be quantised."""

from __future__ import annotations

from typing import Literal

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.quantization.four_bit import fused_weights, unknown_linear
from lightning_pipelite.models.stored.format import Format
from lightning_pipelite.models.trains import Trains

Option = Literal["load_in_4bit", "load_in_fp8"]


def check_quantisation(meta_model: MetaModel, adapter: Trains, *, load_in_4bit: bool, load_in_fp8: bool) -> None:
    """Reject a quantisation that would silently leave weights unquantised, or that the adapter would undo.

    Raises:
        ConfigurationError: A linear layer has a class of the model's own, or FP8 is asked to handle what it does not
            support: fused experts, or an adapter that changes weights.
    """
    if load_in_4bit:
        _check(meta_model, adapter, "load_in_4bit")
    if load_in_fp8:
        _check(meta_model, adapter, "load_in_fp8")


def check_double_quant(stored: Format | None, asked: bool, load_in_4bit: bool) -> bool:
    """Return whether scales of 4-bit weights are quantised too: as requested, or as in files whose codes are kept.

    Raises:
        ConfigurationError: It is requested, but the scales in the files are not quantised.
    """
    if not load_in_4bit or stored is None or stored.keeps != "load_in_4bit":
        return asked
    if asked and not stored.double_quant:
        raise ConfigurationError(
            f"bnb_4bit_use_double_quant: the files are in {stored.title} with float32 scales, which are held as "
            "stored; set it to false."
        )
    return stored.double_quant


def can_quantise(meta_model: MetaModel, adapter: Trains, option: Option) -> bool:
    """Return whether ``option`` passes :func:`check_quantisation`."""
    try:
        _check(meta_model, adapter, option)
    except ConfigurationError:
        return False
    return True


def _check(meta_model: MetaModel, adapter: Trains, option: Option) -> None:
    path = meta_model.model_dir
    if name := unknown_linear(meta_model.model, meta_model.layer_names):
        kind = type(meta_model.model.get_submodule(name)).__name__
        raise ConfigurationError(f"{option} cannot quantise {name} of {path}, a {kind}; set {option} to false.")
    if option == "load_in_4bit":
        return
    if adapter.changes_weights:
        raise ConfigurationError(
            f"load_in_fp8 cannot be used with {adapter.changes_weights}, which changes weights: weights in "
            "FP8 cannot be changed; set load_in_fp8 to false."
        )
    if any(True for _ in fused_weights(meta_model.layers)):
        raise ConfigurationError(
            f"load_in_fp8 does not support the fused experts of {path}; set it to false, and load_in_4bit to true if "
            "memory is short."
        )
