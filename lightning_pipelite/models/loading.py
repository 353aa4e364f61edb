"""Loads the weights of one stage, and of no other, with transformers' own ``from_pretrained``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.contents import refuse_misfits
from lightning_pipelite.models.meta_model import MetaModel, embedding_first
from lightning_pipelite.models.quantization.as_stored import (
    await_codes,
    hold_as_stored,
    keeps_stored,
    kept_weights,
)
from lightning_pipelite.models.quantization.four_bit import (
    keep_trainable,
    kept_names,
    linear_names,
    nf4,
    quantise_on_load,
    quantise_without_weights,
)
from lightning_pipelite.models.quantization.fp8 import hold_in_fp8
from lightning_pipelite.models.stage import EmptyStub, RemoteLayer, ZeroStub
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.models.transformers_compat import (
    attention_of,
    loading_class,
    nothing_to_quantise,
    one_at_a_time,
    set_attention,
)
from lightning_pipelite.models.weight_files import missing_files


def load_trimmed(
    meta_model: MetaModel,
    start: int,
    stop: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_in_4bit: bool,
    load_in_fp8: bool = False,
    double_quant: bool = False,
    pickled: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Return the model trimmed to decoder layers [start, stop), with its weights loaded directly to ``device``.

    The list of decoder layers keeps its full length, so parameters have their global names in every partition. A weight
    that ties embedding and head is held, under the embedding's name, by the first and the last stage. On the meta
    device no weight is read: the model only has shapes and dtypes.

    Raises:
        ConfigurationError: A weight of this stage is missing from the files or has another shape there.
    """
    attn_implementation = attn_implementation or attention_of(meta_model.config)
    numbers, without_weights = range(start, stop), device.type == "meta"
    stored, kept = None, None
    keeps = keeps_stored(meta_model.stored, load_in_4bit=load_in_4bit, load_in_fp8=load_in_fp8)
    if meta_model.stored and not (without_weights and (not keeps or missing_files(meta_model.model_dir))):
        stored = StoredWeights(meta_model.model_dir, meta_model.stored)
        kept = kept_weights(meta_model, stored, numbers) if keeps else None
    if without_weights:
        model = _without_weights(meta_model, start, stop, dtype, attn_implementation)
        _untie(model, meta_model, start, stop, device)
        if load_in_4bit:
            quantise_without_weights(model, meta_model, numbers, dtype, double_quant=double_quant, only=kept)
        if load_in_fp8:
            hold_in_fp8(model, meta_model, numbers, dtype, device)
        return model

    def quantise(model: PreTrainedModel) -> None:
        await_codes(model, kept or ())
        if load_in_4bit:
            quantise_on_load(list(model.get_submodule(meta_model.layers_name))[start:stop], double_quant=double_quant)
        if load_in_fp8:
            hold_in_fp8(model, meta_model, numbers, dtype, device)

    names = meta_model.layer_names
    trimming_class = _trimming_class(meta_model, start, stop, device, quantise)
    with contextlib.ExitStack() as within:
        if load_in_4bit or load_in_fp8 or stored:
            within.enter_context(one_at_a_time())
        if kept is not None:
            within.enter_context(nothing_to_quantise())
        model, report = trimming_class.from_pretrained(
            str(meta_model.model_dir) if stored is None else None,
            state_dict=None if stored is None else stored.on_demand(dtype, device, later=(kept or {}).values()),
            config=meta_model.config,
            dtype=dtype,
            device_map={"": device},
            quantization_config=nf4(
                [meta_model.head_name, *(kept_names if kept is None else linear_names)(meta_model.model, names)],
                dtype,
                double_quant=double_quant,
            )
            if load_in_4bit
            else None,
            use_safetensors=not pickled,
            attn_implementation=attn_implementation,
            key_mapping=meta_model.key_mapping,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below as a single error
            output_loading_info=True,
        )
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    refuse_misfits(meta_model.model_dir, own & set(report["missing_keys"]), report["mismatched_keys"])
    if stored is not None and kept is not None:
        hold_as_stored(model, kept, stored, dtype, device)
    keep_trainable(model)
    _untie(model, meta_model, start, stop, device)
    return model


def load_dequantised(
    whole_class: type[PreTrainedModel], weights: StoredWeights, *, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """Return the whole model on the CPU, its quantised weights dequantised to ``dtype``.

    One reader handles all formats; transformers needs an extra package for each, and a GPU for some.
    """
    with one_at_a_time():
        model: PreTrainedModel = whole_class.from_pretrained(
            None, dtype=dtype, state_dict=weights.on_demand(dtype, torch.device("cpu")), **options
        )
    return model


def _without_weights(
    meta_model: MetaModel, start: int, stop: int, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """Return a trimmed copy of the meta model's model; layers of other stages are not even copied."""
    others = {id(layer): layer for number, layer in enumerate(meta_model.layers) if not start <= number < stop}
    model: PreTrainedModel = copy.deepcopy(meta_model.model, others)
    set_attention(model.config, attn_implementation)
    _trim(model, meta_model, start, stop, torch.device("meta"))
    return model.to(dtype)


def _untie(model: PreTrainedModel, meta_model: MetaModel, start: int, stop: int, device: torch.device) -> None:
    """Check that embedding and head are tied if they must be, and drop the head from the first stage."""
    is_first, is_last = start == 0, stop == len(meta_model.layers)
    if meta_model.tied and (is_first or is_last):
        embedding, head = (model.get_submodule(name) for name in (meta_model.embedding_name, meta_model.head_name))
        if head.weight is not embedding.weight:  # transformers then only warns, and leaves them untied
            raise ConfigurationError(
                f"{meta_model.model_dir} ties {meta_model.head_name} to {meta_model.embedding_name} but its files hold "
                "two different weights; set tie_word_embeddings to false in config.json."
            )
        if not is_last:
            for name in meta_model.tail_names:
                if _holds(name, meta_model.head_name):
                    _drop(model, name, device)


def _trimming_class(
    meta_model: MetaModel,
    start: int,
    stop: int,
    device: torch.device,
    quantise: Callable[[PreTrainedModel], None],
) -> type[PreTrainedModel]:
    """Return the model's class, changed to build a trimmed model, so that ``from_pretrained`` reads only its weights.

    ``quantise`` then prepares the trimmed model to quantise its weights as they are loaded.
    """
    whole_class = type(meta_model.model)

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        whole_class.__init__(self, config, *args, **kwargs)
        embedding_first(self)
        _trim(self, meta_model, start, stop, device)
        quantise(self)

    def adjust_keys(self: PreTrainedModel, report: Any) -> None:
        # Other stages' weights are expected. Missing weights are errors, also for classes that would ignore them.
        report.unexpected_keys = set()

    return loading_class(whole_class, build, adjust_keys)


def _trim(model: PreTrainedModel, meta_model: MetaModel, start: int, stop: int, device: torch.device) -> None:
    layers = model.get_submodule(meta_model.layers_name)
    for number, layer in enumerate(layers):
        if not start <= number < stop:
            layers[number] = RemoteLayer(layer, tuple_length=meta_model.tuple_lengths[number])
    is_first, is_last = start == 0, stop == len(layers)
    # If they are tied, both ends are loaded together, so that transformers finds the weight under either name.
    keeps_ends = meta_model.tied and (is_first or is_last)
    for name in meta_model.start_names:
        nested = any(_holds(outer, name) for outer in meta_model.start_names if outer != name)
        if not is_first and not nested and not (keeps_ends and name == meta_model.embedding_name):
            _replace(model, name, ZeroStub(model.get_submodule(name), model.dtype, device))
    for name in meta_model.tail_names:
        if not is_last and not (keeps_ends and _holds(name, meta_model.head_name)):
            _drop(model, name, device)
    held = dict(model.named_parameters(remove_duplicate=False))
    ties = model.all_tied_weights_keys
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if {name, source} <= held.keys()}


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer + ".")


def _replace(model: PreTrainedModel, name: str, substitute: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, substitute)


def _drop(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Remove a module that never runs on this stage; if it has submodules, only its own weights."""
    module = model.get_submodule(name)
    if next(module.children(), None) is None:
        _replace(model, name, EmptyStub(module, model.dtype, device))
    else:
        for parameter in list(module._parameters):
            delattr(module, parameter)
            setattr(module, parameter, torch.empty(0, dtype=model.dtype, device=device))
