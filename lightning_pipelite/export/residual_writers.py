"""Finds the weights of a decoder layer that write into the residual stream, by probing a tiny model of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.probe import Probe

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Writer:
    """A weight whose product is added to the residual stream.

    Attributes:
        weight: Name of the parameter in the model.
        transposed: Whether it is stored as [..., in, out].
        bias: Name of the bias that is added to the product, or None.
    """

    weight: str
    transposed: bool
    bias: str | None


@dataclass(frozen=True)
class LayerWriters:
    """The writers of one decoder layer with input h and output y.

    Attributes:
        last: Those whose product reaches y directly: multiplying it by a matrix M multiplies its part of y - h by M.
        first: Those whose product is also seen by the last ones; if there are none, the layer is parallel, and y - h is
            the sum of the products of ``last``.
    """

    last: tuple[Writer, ...]
    first: tuple[Writer, ...]


def find_writers(
    config: PretrainedConfig,
    layer_names: list[str],
    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config,
) -> dict[str, LayerWriters]:
    """Find the writers of some decoder layers.

    This uses no table of models. A module with weights of its own is a writer if a vector v added to its output leaves
    the layer as v times a number, which may differ from token to token: residual factors, gates and routers only scale
    v, norms do not. ``last`` are the modules that pass this test in the unchanged layer, ``first`` those that pass it
    with the outputs of ``last`` zeroed. Together they must make up all of y - h, and multiplying the weight found in
    each by a matrix must multiply its output by that matrix.

    Args:
        config: The model's configuration.
        layer_names: Full names of the layers.
        build: Builds a model from a configuration.

    Raises:
        ConfigurationError: What a layer adds is not linear in the products of its weights.
    """
    with torch.no_grad():
        probe = Probe(config, build)
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        hooks = [
            probe.model.get_submodule(name).register_forward_pre_hook(_keep(calls, name), with_kwargs=True)
            for name in layer_names
        ]
        probe.model(input_ids=probe.input_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return {name: _Trial(probe.model.get_submodule(name), name, *calls[name]).writers() for name in layer_names}


def _keep(calls: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = (args, kwargs)

    return hook


class _Trial:
    """A decoder layer of the tiny model, with a recorded input."""

    def __init__(self, layer: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.name, self.args, self.kwargs = layer, name, args, kwargs
        self.input: Tensor = args[0] if args else kwargs["hidden_states"]
        self.hidden = self.input.shape[-1]
        self.candidates = [
            each for each, module in layer.named_modules() if each and any(_matrices(module, self.hidden))
        ]

    def writers(self) -> LayerWriters:
        delta = self.run() - self.input
        last = [name for name in self.candidates if self._passes(name)]
        rest = self._unwritten(last)
        first: list[str] = []
        if not _small(rest, delta):
            with self.silent(last):
                others = [name for name in self.candidates if name not in last]
                first = [name for name in others if self._passes(name)]
                rest = self._unwritten(first)
        if not last or not _small(rest, delta):
            raise ConfigurationError(
                f"{self.name}, a {type(self.layer).__name__}, does not just add the products of its weights to its "
                "input (a norm may follow them), so no LoRA does what a Control Adapter does there; run the model with "
                "the Control Adapter itself instead."
            )
        return LayerWriters(tuple(map(self._writer, last)), tuple(map(self._writer, first)))

    def run(self) -> Tensor:
        returned = self.layer(*self.args, **self.kwargs)
        return returned[0] if isinstance(returned, tuple) else returned

    @contextmanager
    def changing(self, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Apply ``change`` to the output of the module ``name``."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = self.layer.get_submodule(name).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def silent(self, names: list[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self.changing(name, torch.zeros_like))
            yield

    def _passes(self, name: str) -> bool:
        """Return whether a vector added to the module's output leaves the layer unchanged up to a scale per token."""
        before = self.run()
        scales: list[Tensor] = []
        for seed in (0, 1):
            vector = torch.randn(self.hidden, generator=torch.Generator().manual_seed(seed))
            with self.changing(name, partial(_plus, vector)):
                change = self.run() - before
            scales.append(change @ vector / (vector @ vector))
            if not _small(change - scales[-1][..., None] * vector, change) or not bool((scales[-1].abs() > 1e-3).any()):
                return False
        return torch.allclose(scales[0], scales[1], rtol=1e-3, atol=1e-4)

    def _unwritten(self, names: list[str]) -> Tensor:
        """Return what the layer still adds to its input with the outputs of ``names`` zeroed."""
        with self.silent(names):
            return self.run() - self.input

    def _writer(self, name: str) -> Writer:
        """Find the parameter of the module ``name`` that a matrix applied to its output can be folded into."""
        module = self.layer.get_submodule(name)
        generator = torch.Generator().manual_seed(2)
        matrix = torch.eye(self.hidden) + 0.3 * torch.randn(self.hidden, self.hidden, generator=generator)
        before = self._output(name)
        for parameter, transposed in _matrices(module, self.hidden):
            for bias in (None, *(each for each, p in module._parameters.items() if _is_bias(p, self.hidden))):
                kept = {each: module._parameters[each] for each in (parameter, bias) if each}
                try:
                    for each, value in kept.items():
                        assert value is not None
                        by = value @ matrix.mT if each == bias or transposed else matrix @ value
                        module._parameters[each] = nn.Parameter(by)
                    after = self._output(name)
                finally:
                    module._parameters.update(kept)
                if _small(after - before @ matrix.mT, before):
                    full = f"{self.name}.{name}"
                    return Writer(f"{full}.{parameter}", transposed, f"{full}.{bias}" if bias else None)
        raise ConfigurationError(
            f"{self.name}.{name}, a {type(module).__name__}, is not linear in any one of its weights, so no LoRA "
            "does what a Control Adapter does there; run the model with the Control Adapter itself instead."
        )

    def _output(self, name: str) -> Tensor:
        kept: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            kept.append(output)
            return output

        with self.changing(name, keep):
            self.run()
        return kept[0]


def _matrices(module: nn.Module, hidden: int) -> Iterator[tuple[str, bool]]:
    """Yield the module's own weights that can have ``hidden`` outputs, and whether they would be [..., in, out]."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim in (2, 3) and "bias" not in name:
            for dimension in (-2, -1):
                if parameter.shape[dimension] == hidden:
                    yield name, dimension == -1


def _is_bias(parameter: nn.Parameter | None, hidden: int) -> bool:
    return parameter is not None and parameter.ndim in (1, 2) and parameter.shape[-1] == hidden


def _plus(vector: Tensor, output: Tensor) -> Tensor:
    return output + vector if output.shape[-1] == len(vector) else output


def _small(difference: Tensor, size: Tensor) -> bool:
    return bool(difference.abs().max() <= TOLERANCE * size.abs().max().clamp(min=1e-30))
