"""What a class of models does, found out by running a tiny model of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_pipelite.models.packing import documents_apart
from lightning_pipelite.models.tiny import tiny_config
from lightning_pipelite.models.trace import Trace, trace_forward

DOCUMENTS = (5, 7)  # tokens of the packed documents of the trial
NOISE = 0.1  # added to every weight: as they are initialised, norms, biases and gates would hide much


class Probe:
    """Runs a tiny model with the kinds of layers and the depth of the real one, on the CPU in float32.

    Args:
        config: The real model's configuration.
        build: Builds a model from a configuration.

    Attributes:
        model: The tiny model, in evaluation mode.

    Raises:
        Exception: Whatever the class raises where a tiny model cannot be built.
    """

    def __init__(
        self, config: PretrainedConfig, build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with torch.device("cpu"):
                self.model = build(tiny_config(config), dtype=torch.float32).eval()
            for parameter in self.model.parameters():
                parameter.data += NOISE * torch.randn_like(parameter)
            self.input_ids = torch.randint(3, 120, (1, sum(DOCUMENTS)))
        self.takes_positions = False
        if takes_positions(self.model):
            counted_by_itself = self._logits(self.input_ids)
            self.takes_positions = True
            # Some classes, RoBERTa's for one, begin to count elsewhere: there, positions from 0 are another model.
            self.takes_positions = _equal(self._logits(self.input_ids, _count(self.input_ids)), counted_by_itself)

    def trace(self, layer_names: Sequence[str], other_names: Sequence[str]) -> Trace:
        """Return what one forward shows of the named decoder layers and other modules."""
        positions = _count(self.input_ids)
        return trace_forward(
            self.model, layer_names, other_names, lambda ids: self._logits(ids, positions), self.input_ids
        )

    def sees_the_future(self) -> bool:
        """Tell whether a token's logits depend on later tokens."""
        changed = self.input_ids.clone()
        changed[:, DOCUMENTS[0] :] = (changed[:, DOCUMENTS[0] :] + 1) % 120
        logits = [self._logits(ids)[:, : DOCUMENTS[0]] for ids in (self.input_ids, changed)]
        return not _equal(*logits)

    def isolates_documents(self) -> bool:
        """Tell whether each of two packed documents has the logits that it has alone."""
        documents = self.input_ids.split(DOCUMENTS, dim=1)
        packed = self._logits(self.input_ids, _packed_positions()).split(DOCUMENTS, dim=1)
        return all(_equal(self._logits(ids), logits) for ids, logits in zip(documents, packed, strict=True))

    def attends_as(self, other: Probe) -> bool:
        """Tell whether packed documents have the logits that they have in a model that attends by other code."""
        return _equal(*(each._logits(each.input_ids, _packed_positions()) for each in (self, other)))

    @torch.no_grad()
    def _logits(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        given = position_ids is not None and self.takes_positions
        arguments: dict[str, Any] = {"position_ids": position_ids} if given else {}
        with documents_apart(position_ids):
            return self.model(input_ids=input_ids, use_cache=False, **arguments).logits


def takes_positions(model: PreTrainedModel) -> bool:
    """Tell whether a causal LM's forward has ``position_ids`` among its arguments, or passes them on."""
    outer = inspect.signature(type(model).forward).parameters
    inner = inspect.signature(type(model.base_model).forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer.values())
    return "position_ids" in outer or (passes_on and "position_ids" in inner)


def _packed_positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


def _count(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1])[None]


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isfinite(a).all()) and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1))
