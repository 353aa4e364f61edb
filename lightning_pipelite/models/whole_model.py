"""The model that transformers loads from a directory, and PEFT adapts; the causal LM may be only a part of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.models.text_part import AUTO_CLASSES
from lightning_pipelite.models.transformers_compat import loads_by


class WholeModel:
    """The whole model that ``from_pretrained`` returns for a directory, and the names of the causal LM's parts in it.

    A model with images or sound besides text has a class of its own for the whole. If several of the three auto classes
    know the configuration, :func:`whole_model` takes the first. An adapter's file has the names of the whole model.

    Args:
        model: The whole model, on the meta device.
        causal_lm: The text model alone, on the meta device; ``model`` if there is nothing else.

    Attributes:
        model: The whole model.

    Raises:
        ConfigurationError: The text model is not found in the whole model.
    """

    def __init__(self, model: PreTrainedModel, causal_lm: PreTrainedModel) -> None:
        self.model = model
        self._places = _places(model, causal_lm)

    def name(self, own: str) -> str:
        """Return the whole model's name for the causal LM's module or parameter ``own``."""
        for place, there in self._places.items():
            if own.startswith(place):
                return there + own.removeprefix(place)
        raise KeyError(own)

    def module_name(self, own: str) -> str:
        """Return the whole model's name for the causal LM's module ``own``, which has a weight."""
        return self.name(f"{own}.weight").removesuffix(".weight")

    def own_name(self, name: str) -> str | None:
        """Return the causal LM's name for the whole model's module or parameter ``name``; None if it has none."""
        for place, there in self._places.items():
            if name.startswith(there):
                return place + name.removeprefix(there)
        return None

    def is_meant(self, names: Iterable[str]) -> bool:
        """Return whether ``names`` are those of the whole model, not of a causal LM that is only a part of it."""
        own, there = next(iter(self._places.items()))
        return own != there and any(name.startswith(there) for name in names)

    def copy(self) -> PreTrainedModel:
        """Return a copy of the whole model on the meta device, in float32."""
        return copy.deepcopy(self.model).float()


def whole_models(model_dir: Path, causal_lm: PreTrainedModel, trust_remote_code: bool) -> Iterator[WholeModel]:
    """Yield the whole models that have ``causal_lm`` as their text model, one for each auto class that knows them.

    Raises:
        ConfigurationError: One cannot be built, or the text model is not found in it.
    """
    config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code)
    for auto in AUTO_CLASSES:
        if loads_by(auto, config):
            try:
                with torch.device("meta"):
                    given = copy.deepcopy(config)
                    model = auto.from_config(given, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
            except Exception as error:  # whatever the class requires that is missing
                reason = f"the class that transformers loads from its directory cannot be built ({first_line(error)})"
                raise _refusal(config, reason) from error
            yield WholeModel(model, causal_lm)


def whole_model(model_dir: Path, causal_lm: PreTrainedModel, trust_remote_code: bool) -> WholeModel:
    """Return the first of :func:`whole_models`: what ``from_pretrained`` gives for the directory.

    Raises:
        ConfigurationError: As :func:`whole_models`, or no auto class knows the model.
    """
    for whole in whole_models(model_dir, causal_lm, trust_remote_code):
        return whole
    raise _refusal(causal_lm.config, "no auto class of transformers loads its directory")


def _places(model: PreTrainedModel, causal_lm: PreTrainedModel) -> dict[str, str]:
    """Return the prefixes of the causal LM's names, each with its counterpart in the whole model."""
    if isinstance(causal_lm, type(model)):  # the whole model, or its class without towers
        return {"": ""}
    for own, module in (("", causal_lm), (f"{causal_lm.base_model_prefix}.", causal_lm.base_model)):
        found = [f"{name}." for name, each in model.named_modules() if type(each) is type(module)]
        if len(found) == 1:
            places = {own: found[0]}
            heads = [_head(causal_lm), _head(model)]
            return places if not own or None in heads else {**places, f"{heads[0]}.": f"{heads[1]}."}
    raise _refusal(model.config, f"no {type(causal_lm).__name__} was found in the {type(model).__name__}")


def _head(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def _refusal(config: PretrainedConfig, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"an adapter for a model of type {config.model_type} could not be used because {reason}; train its whole "
        "weights with the adapter Full."
    )
