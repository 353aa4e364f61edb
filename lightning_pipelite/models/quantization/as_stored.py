"""Holds linear layers as stored in the files: their codes are not dequantised and quantised again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_pipelite.models.quantization.four_bit import kept_names, linear_as_stored
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from lightning_pipelite.models.stored.format import Format
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.models.transformers_compat import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)

if TYPE_CHECKING:
    from lightning_pipelite.models.meta_model import MetaModel


class Awaiting(nn.Linear):
    """A linear layer whose codes are read after the rest of the model is loaded; quantisers leave it alone."""


def keeps_stored(stored: Format | None, *, load_in_4bit: bool, load_in_fp8: bool) -> bool:
    """Return whether these options hold weights as files of the format ``stored`` have them."""
    asked = {"load_in_4bit": load_in_4bit, "load_in_fp8": load_in_fp8}
    return stored is not None and stored.keeps is not None and asked[stored.keeps]


def kept_weights(meta_model: MetaModel, weights: StoredWeights, numbers: range) -> dict[str, str]:
    """Return the linear layers of the decoder layers ``numbers`` that can be held as stored in the files.

    Layers that transformers makes from several weights, or from part of one, are excluded. Layers that the files hold
    unquantised stay so with load_in_4bit, as in transformers: that was the choice of whoever made the files.

    Returns:
        The name of each layer, mapped to the name of its weight in the files.
    """
    model = meta_model.model
    transforms = get_model_conversion_mapping(model, key_mapping=meta_model.key_mapping)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    own = dict.fromkeys(model.state_dict(), True)
    routers = {*kept_names(model, [meta_model.layer_names[number] for number in numbers])}
    found = {}
    for file in filter(weights.can_keep, weights.entries):
        name, pattern = rename_source_key(file, renamings, converters, model.base_model_prefix, own)
        name = name if name in own or file not in own else file
        module = name.removesuffix(".weight")
        if pattern is not None or name not in own or meta_model.layer_of(name) not in numbers or module in routers:
            continue
        if type(model.get_submodule(module)) is nn.Linear:
            found[module] = file
    return found


def await_codes(model: nn.Module, kept: Iterable[str]) -> None:
    """Make the layers ``kept`` of a model on the meta device load nothing but their biases."""
    for name in kept:
        model.get_submodule(name).__class__ = Awaiting


def hold_as_stored(
    model: nn.Module, kept: Mapping[str, str], weights: StoredWeights, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the layers ``kept`` of a loaded model the codes in the files, 4-bit or FP8, to compute in ``dtype``."""
    for name, file in kept.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Awaiting)
        codes, how = weights.read_kept(file, device)
        if codes.dtype == torch.uint8:
            model.set_submodule(name, linear_as_stored(linear, codes, how, dtype))
        else:
            layer = Fp8Linear(linear, name, dtype, device)
            layer.keep(codes, how)
            model.set_submodule(name, layer)
