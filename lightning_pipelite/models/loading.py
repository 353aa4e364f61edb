"""Loads the weights of one stage with transformers' own ``from_pretrained``, and nothing of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.skeleton import Skeleton
from lightning_pipelite.models.stage import Placeholder


def load_trimmed(
    skeleton: Skeleton, start: int, stop: int, *, dtype: torch.dtype, device: torch.device, load_in_4bit: bool
) -> PreTrainedModel:
    """Return the model trimmed to decoder layers [start, stop), its weights loaded straight to ``device``.

    The model keeps the list of decoder layers at full length, so parameters have their global names whatever the
    partition. A weight that ties embedding and head is held, under the embedding's name, by the first and the last
    stage.

    Raises:
        ConfigurationError: A weight of this stage is missing from the files or has another shape there.
    """
    model, report = _trimming_class(skeleton, start, stop).from_pretrained(
        str(skeleton.model_dir),
        config=skeleton.config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=_nf4(skeleton, dtype) if load_in_4bit else None,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # reported below, in one sentence
        output_loading_info=True,
    )
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if missing:
        raise ConfigurationError(f"{skeleton.model_dir} lacks the weights {', '.join(missing)}; fetch the model again.")
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"], key=lambda entry: entry[0])[0]
        raise ConfigurationError(
            f"{skeleton.model_dir}: the weight {name} has shape {list(found)} but config.json asks for {list(wanted)}; "
            "fetch the model again."
        )
    is_first, is_last = start == 0, stop == len(skeleton.layers)
    if skeleton.tied and (is_first or is_last):
        embedding, head = (model.get_submodule(name) for name in (skeleton.embedding_name, skeleton.head_name))
        if head.weight is not embedding.weight:  # transformers only warns, and does not tie them
            raise ConfigurationError(
                f"{skeleton.model_dir} ties {skeleton.head_name} to {skeleton.embedding_name} but its files hold two "
                "different weights; set tie_word_embeddings to false in config.json."
            )
        if not is_last:
            _replace(model, skeleton.head_name)
    return model


def _trimming_class(skeleton: Skeleton, start: int, stop: int) -> type[PreTrainedModel]:
    """Return the model's class, but building itself trimmed: ``from_pretrained`` reads only what a model asks for."""
    whole_class = type(skeleton.model)

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        whole_class.__init__(self, config, *args, **kwargs)
        _trim(self, skeleton, start, stop)

    def adjust_keys(self: PreTrainedModel, report: Any) -> None:
        # The other stages' weights are no surprise. That a weight is missing always is: some classes forgive it.
        report.unexpected_keys = set()

    members = {"__init__": build, "_adjust_missing_and_unexpected_keys": adjust_keys}
    # Name and module stay: transformers looks them up to find a model's loss and its weight conversions.
    return type(whole_class.__name__, (whole_class,), {**members, "__module__": whole_class.__module__})


def _trim(model: PreTrainedModel, skeleton: Skeleton, start: int, stop: int) -> None:
    layers = model.get_submodule(skeleton.layers_name)
    for number, layer in enumerate(layers):
        if not start <= number < stop:
            layers[number] = Placeholder(layer, leaves=number == stop, returns_tuple=skeleton.layers_return_tuple)
    is_first, is_last = start == 0, stop == len(layers)
    # Where they are tied, both ends are loaded together: transformers then finds the weight under either name.
    keeps_ends = skeleton.tied and (is_first or is_last)
    if not is_first and not keeps_ends:
        _replace(model, skeleton.embedding_name)
    for name in skeleton.tail_names:
        if not is_last and not (keeps_ends and name == skeleton.head_name):
            _replace(model, name)
    if skeleton.tied and not keeps_ends:
        model.all_tied_weights_keys = {}


def _replace(model: PreTrainedModel, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())


def _nf4(skeleton: Skeleton, dtype: torch.dtype) -> BitsAndBytesConfig:
    # The head is named because transformers, left alone, guesses it as a model's last module: on a trimmed model that
    # is a decoder layer's.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[skeleton.head_name],
    )
