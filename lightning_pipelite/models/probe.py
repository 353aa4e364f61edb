"""Finds out what a model class does by running a tiny model of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_pipelite.models.attention.by_document import Call, leaking_modules, run_as_it_is, run_by_document
from lightning_pipelite.models.attention.document_mask import document_mask
from lightning_pipelite.models.tiny import build_tiny
from lightning_pipelite.models.trace import Trace, trace_forward

DOCUMENTS = (5, 7)  # lengths of the packed documents of a trial, in tokens
CLOSE = 1e-2  # largest difference between logits, relative to the largest one, that may be due to rounding
STRONG = 8.0  # factor for weights, so that attention scores reach the caps and sinks of real models


class Probe:
    """Runs a tiny model with the depth and the kinds of layers of the real one, on the CPU in float32.

    Args:
        config: The real model's configuration.
        build: Builds a model from a configuration.
        known: A probe of the same class with another attention implementation; results independent of it are reused.

    Attributes:
        model: The tiny model, in evaluation mode.
        by_document: Names of the modules that run on each packed document separately.

    Raises:
        Exception: Whatever the class raises if a tiny model cannot be built.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config,
        known: Probe | None = None,
    ) -> None:
        self._seen: dict[Any, Tensor] = {}
        self.model: PreTrainedModel = build_tiny(config, build, None if known is None else known.model).eval()
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(3, 120, (1, sum(DOCUMENTS)), generator=generator)
        self.takes_positions: bool = known is not None and known.takes_positions
        self.by_document: list[str] = [] if known is None else known.by_document
        run_by_document(self.model, self.by_document)
        if known is None and takes_positions(self.model):
            counted_by_itself = self._logits(self.input_ids)
            self.takes_positions = True
            # Some classes, such as RoBERTa's, do not count from 0: explicit positions from 0 change what they compute.
            self.takes_positions = equal(self._logits(self.input_ids, _count(self.input_ids)), counted_by_itself)

    def trace(self, layer_names: Sequence[str], other_names: Sequence[str]) -> Trace:
        """Trace one forward through the named decoder layers and other modules."""
        positions = _count(self.input_ids)
        return trace_forward(
            self.model, layer_names, other_names, lambda ids: self._run(ids, positions), self.input_ids
        )

    def sees_the_future(self) -> bool:
        """Return whether a token's logits depend on later tokens."""
        changed = self.input_ids.clone()
        changed[:, DOCUMENTS[0] :] = (changed[:, DOCUMENTS[0] :] + 1) % 120
        logits = [self._logits(ids)[:, : DOCUMENTS[0]] for ids in (self.input_ids, changed)]
        return not equal(*logits)

    def isolates_documents(self) -> bool:
        """Return whether each of two packed documents gets the same logits as alone."""

        def alone_and_packed() -> list[tuple[Tensor, Tensor]]:
            packed = self._logits(self.input_ids, _packed_positions()).split(DOCUMENTS, dim=1)
            alone = [self._logits(ids) for ids in self.input_ids.split(DOCUMENTS, dim=1)]
            return list(zip(alone, packed, strict=True))

        return _equal_exactly(alone_and_packed, self)

    def isolate_documents(self, layer_names: Sequence[str]) -> bool:
        """Run modules that leak between packed documents on each one separately; return whether that is enough."""
        self.by_document = self._leaking_modules(layer_names)
        run_by_document(self.model, self.by_document)
        self._seen.clear()
        try:
            isolated = self.isolates_documents()
        except NotImplementedError:  # the class passes its layers per-token arguments of an unknown layout
            isolated = False
        if not isolated:
            run_as_it_is(self.model, self.by_document)
            self.by_document = []
            self._seen.clear()
        return isolated

    @torch.no_grad()
    def _leaking_modules(self, layer_names: Sequence[str]) -> list[str]:
        calls: dict[str, Call] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls[name] = args, kwargs

            return hook

        layers = [(name, module) for name, module in self.model.named_modules() if name.startswith(tuple(layer_names))]
        handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in layers]
        try:
            self._run(self.input_ids, _packed_positions())
        finally:
            for handle in handles:
                handle.remove()
        with document_mask(_packed_positions()):
            return [name for each in layer_names for name in leaking_modules(calls, self.model, each, DOCUMENTS[0])]

    def bypassed_in_training(self) -> set[str]:
        """Return the names of linear layers whose weights get a gradient in training though they are not called.

        Gemma 3n uses some weights directly, to clip them. An adapter on such a layer would be bypassed. Layers that
        merely do not run, such as experts without tokens and those that ``layerdrop`` skips, get no gradient.
        """
        called: set[str] = set()
        linear = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
            for name, module in linear
        ]
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():  # for dropout
                self.model.train()
                logits = self._forward(self.input_ids, _count(self.input_ids))
                uncalled = [(name, module.weight) for name, module in linear if name not in called]
                weights = [weight for _, weight in uncalled]
                gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True) if weights else ()
        finally:
            self.model.eval()
            self.model.load_state_dict(before)
            for handle in handles:
                handle.remove()
        return {name for (name, _), gradient in zip(uncalled, gradients, strict=True) if gradient is not None}

    def attends_as(self, other: Probe) -> bool:
        """Return whether packed documents get the same logits as with ``other``'s attention implementation."""

        def of_both() -> list[tuple[Tensor, Tensor]]:
            ours, theirs = (each._logits(each.input_ids, _packed_positions()) for each in (self, other))
            return [(ours, theirs)]

        return _equal_exactly(of_both, self, other)

    @torch.no_grad()
    def layers_attend_as(self, other: Probe, layer_names: Sequence[str]) -> bool:
        """Return whether each decoder layer has the same output as with ``other``'s attention implementation.

        Weights are scaled up, and every layer gets the input of the first one, so that neither rounding errors nor the
        magnitude of the hidden states grow from layer to layer.
        """
        outputs: list[list[Tensor]] = []
        for probe in (self, other):
            outputs.append(probe._outputs_with_strong_weights(layer_names))
        return all(
            torch.equal(a.isfinite(), b.isfinite()) and bool((a - b).abs().nan_to_num().max() <= 1e-3 * b.abs().max())
            for a, b in zip(*outputs, strict=True)
        )

    def _outputs_with_strong_weights(self, layer_names: Sequence[str]) -> list[Tensor]:
        outputs: list[Tensor] = []
        first: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first.append(args[0] if args else kwargs["hidden_states"])
            return ((first[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first[0]})

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        layers = [self.model.get_submodule(name) for name in layer_names]
        matrices = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(after) for layer in layers]
        kept = [matrix.data for matrix in matrices]
        try:
            for matrix in matrices:
                matrix.data = matrix.data * STRONG
            self._run(self.input_ids, _count(self.input_ids))
        finally:
            for handle in handles:
                handle.remove()
            for matrix, data in zip(matrices, kept, strict=True):
                matrix.data = data
        return outputs

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the model to ``dtype``."""
        self.model.to(dtype)
        self._seen.clear()

    def _logits(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return the model's logits, cached because several checks use the same ones."""
        values = [None if tensor is None else tuple(tensor.flatten().tolist()) for tensor in (input_ids, position_ids)]
        asked = (*values, self.takes_positions and position_ids is not None)
        if asked not in self._seen:
            self._seen[asked] = self._run(input_ids, position_ids)
        return self._seen[asked]

    @torch.no_grad()
    def _run(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        return self._forward(input_ids, position_ids)

    def _forward(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        given = position_ids is not None and self.takes_positions
        arguments: dict[str, Any] = {"position_ids": position_ids} if given else {}
        with document_mask(position_ids):
            return self.model(input_ids=input_ids, use_cache=False, **arguments).logits


def _equal_exactly(pairs: Callable[[], list[tuple[Tensor, Tensor]]], *probes: Probe) -> bool:
    """Return whether logits that were computed by different code, or in other shapes, are equal.

    Rounding errors grow from layer to layer: in float32, sixty layers of some classes differ by as much as a leak
    might. Logits that are merely close are computed again in float64.
    """
    found = pairs()
    if all(equal(a, b) for a, b in found):
        return True
    if not all(float((a - b).abs().max()) <= CLOSE * float(b.abs().max() + 1) for a, b in found):
        return False
    try:
        for probe in probes:
            probe.cast(torch.float64)
        return all(equal(a, b) for a, b in pairs())
    except RuntimeError:  # the class keeps parts in float32 whatever dtype is requested
        return False
    finally:
        for probe in probes:
            probe.cast(torch.float32)


def takes_positions(model: PreTrainedModel) -> bool:
    """Return whether a causal LM's forward takes ``position_ids``, or passes them on."""
    outer = inspect.signature(type(model).forward).parameters
    inner = inspect.signature(type(model.base_model).forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in outer.values())
    return "position_ids" in outer or (passes_on and "position_ids" in inner)


def _packed_positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


def _count(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1])[None]


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether ``a`` is finite and equals ``b`` up to rounding in float32."""
    return bool(torch.isfinite(a).all()) and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1))
