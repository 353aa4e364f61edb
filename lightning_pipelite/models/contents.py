"""Checks from the file headers, before any weight is read, that the files hold the model of config.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.meta_model import MetaModel, embedding_first
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.models.transformers_compat import forgive_keys, loading_class, no_init_weights
from lightning_pipelite.models.weight_files import FLOATS


def check_contents(meta_model: MetaModel) -> None:
    """Check that the safetensors files hold all of the model's weights in the right shapes, and no extra layers.

    transformers' own code rehearses the load with meta tensors of the shapes in the headers, so that these are renamed
    and fused as in the real load.

    Raises:
        ConfigurationError: A weight is missing, has another shape, does not belong to config.json's model, or is not
            stored in a plain floating-point dtype.
    """
    weights = StoredWeights(meta_model.model_dir, meta_model.stored)
    entries = weights.entries
    parameters = dict(meta_model.model.named_parameters(remove_duplicate=False))
    for name, entry in entries.items():
        # Names of fused experts do not end in .weight. Any tensor in FP8 or less holds codes, so it counts too.
        is_weight = name.endswith(".weight") or name in parameters or entry["dtype"].startswith("F")
        if is_weight and entry["dtype"] not in FLOATS:
            raise ConfigurationError(
                f"{meta_model.model_dir}: the weight {name} is stored as {entry['dtype']}; use a version of the model "
                "in bfloat16, float16 or float32."
            )
    report = _rehearse(meta_model, {n: torch.empty(e["shape"], device="meta") for n, e in entries.items()})
    buffers = {n for n, b in meta_model.model.state_dict().items() if b.is_floating_point()} - parameters.keys()
    missing = (parameters.keys() & report.missing_keys) | (buffers & report.unforgiven_keys)
    refuse_misfits(meta_model.model_dir, missing, report.mismatched_keys)
    if report.conversion_errors:
        raise ConfigurationError(
            f"{meta_model.model_dir}: the weights that make up {min(report.conversion_errors)} are incomplete or "
            "have different shapes; fetch the model again."
        )
    count = len(meta_model.layers)
    heads = range(count, count + (getattr(meta_model.config, "num_nextn_predict_layers", 0) or 0))
    for name in sorted(report.unexpected_keys):
        layer, (module, _, own) = meta_model.layer_of(name), name.rpartition(".")
        if layer is None or layer in heads or weights.adds_nothing(name):
            continue  # left-out parts of a multimodal model, or multi-token prediction heads
        if layer >= count or own == "weight" or (own == "bias" and f"{module}.weight" in parameters):
            raise ConfigurationError(
                f"{meta_model.model_dir} holds the weight {name}, which the model described by its config.json does "
                "not have; correct config.json."
            )


def refuse_misfits(model_dir: Path, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise an error if a weight is missing or has another shape.

    Args:
        model_dir: Directory of the model.
        missing: Names of weights that no file holds.
        mismatched: Names, shapes in the files, shapes that config.json requires.

    Raises:
        ConfigurationError: ``missing`` or ``mismatched`` is not empty.
    """
    if names := sorted(missing):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigurationError(
            f"{model_dir} lacks weights that config.json requires: {', '.join(names[:3])}{more}; fetch the model again."
        )
    for name, found, wanted in sorted(mismatched, key=lambda entry: entry[0]):
        raise ConfigurationError(
            f"{model_dir}: the weight {name} has shape {list(found)} but config.json requires {list(wanted)}; fetch "
            "the model again."
        )


class _Report:
    """What transformers found in a load, before it raises errors of its own."""

    missing_keys: set[str]
    unforgiven_keys: set[str]  # the missing ones that the class does not declare dispensable
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, Any, Any]]
    conversion_errors: dict[str, str]


def _rehearse(meta_model: MetaModel, state: dict[str, torch.Tensor]) -> _Report:
    """Load ``state`` into a new model on the meta device."""
    whole_class = type(meta_model.model)
    found = _Report()

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        with no_init_weights():  # meta tensors have nothing to initialise
            whole_class.__init__(self, config, *args, **kwargs)
        embedding_first(self)

    def adjust_keys(self: PreTrainedModel, report: Any) -> None:
        found.missing_keys = set(report.missing_keys)
        forgive_keys(whole_class, self, report)
        found.unforgiven_keys = set(report.missing_keys)
        found.unexpected_keys, found.mismatched_keys = set(report.unexpected_keys), set(report.mismatched_keys)
        found.conversion_errors = dict(report.conversion_errors)
        for part in (report.missing_keys, report.unexpected_keys, report.mismatched_keys, report.conversion_errors):
            part.clear()

    rehearsing_class = loading_class(whole_class, build, adjust_keys)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        rehearsing_class.from_pretrained(
            None,
            config=meta_model.config,
            state_dict=state,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            key_mapping=meta_model.key_mapping,
            ignore_mismatched_sizes=True,
        )
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    return found
