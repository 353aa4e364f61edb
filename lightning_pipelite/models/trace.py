"""Traces one forward of a causal LM: which parts run where, and what passes from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from typing_extensions import override

START = -1  # what only the first stage has: the tokens, and what is computed from them and weights before the layers


@dataclass
class Trace:
    """The result of a trace.

    Attributes:
        order: Names of the watched modules and layers, in the order of their calls.
        tuple_lengths: For each layer, how many values it returns in a tuple; 0 if it returns only the hidden states.
        carried: Pairs ``(i, j)``: layer j, or what follows it, uses what layer i (or :data:`START`) computed, other
            than through the hidden states and ``start_inputs``. Both must be on one stage.
        start_inputs: For each layer, which of its arguments besides the hidden states, by position or name, are
            floating-point tensors from :data:`START`: they can travel with the hidden states.
        hidden_missing: Whether a layer got no tensor of hidden states as its first argument.
        without_tensors: Names of other modules that were called with no tensor, so that their stubs know no shape.
        shared_inputs: Names of linear layers, grouped where consecutive calls got the same tensor.
    """

    order: list[str] = field(default_factory=list)
    tuple_lengths: list[int] = field(default_factory=list)
    carried: set[tuple[int, int]] = field(default_factory=set)
    start_inputs: list[list[int | str]] = field(default_factory=list)
    hidden_missing: bool = False
    without_tensors: set[str] = field(default_factory=set)
    shared_inputs: list[list[str]] = field(default_factory=list)


def trace_forward(
    model: PreTrainedModel,
    layer_names: Sequence[str],
    other_names: Sequence[str],
    run: Callable[[Tensor], Tensor],
    input_ids: Tensor,
) -> Trace:
    """Trace ``run(input_ids)``, a forward of ``model`` that returns the logits.

    Args:
        model: A causal LM.
        layer_names: Names of its decoder layers.
        other_names: Names of other modules whose calls are recorded.
        run: Calls the model.
        input_ids: Int64 [batch, seq].

    Raises:
        Exception: Whatever the model raises.
    """
    trace = Trace(tuple_lengths=[0] * len(layer_names), start_inputs=[[] for _ in layer_names])
    flow = _Flow(trace, len(layer_names))
    flow.mark([input_ids], {START})
    flow.mark(model.parameters(), {START})
    owners: dict[nn.Parameter, set[int]] = {}  # several if layers share a weight
    for number, name in enumerate(layer_names):
        for parameter in model.get_submodule(name).parameters():
            owners.setdefault(parameter, set()).add(number)
    for parameter, numbers in owners.items():
        flow.mark([parameter], numbers)

    def before_layer(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.order.append(layer_names[number])
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                flow.enter(number, hidden, sum(value is hidden for value in tensors_in((args, kwargs))))
                trace.start_inputs[number] = flow.give([*enumerate(args), *kwargs.items()])
            else:
                trace.hidden_missing = True

        return hook

    def after_layer(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            trace.tuple_lengths[number] = len(output) if isinstance(output, tuple) else 0
            flow.leave(tensors_in(output[1:]) if isinstance(output, tuple) else [])

        return hook

    def before_other(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.order.append(name)
            if not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                trace.without_tensors.add(name)

        return hook

    shared = _SharedInputs(trace.shared_inputs)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(shared.called(name)))
    for number, name in enumerate(layer_names):
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(before_layer(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(after_layer(number)))
    for name in other_names:
        handles.append(model.get_submodule(name).register_forward_pre_hook(before_other(name), with_kwargs=True))
    try:
        with torch.no_grad(), flow:
            logits = run(input_ids)
        flow.finish(logits)
    finally:
        for handle in handles:
            handle.remove()
    return trace


class _SharedInputs:
    """Records which linear layers get the same tensor in consecutive calls."""

    def __init__(self, groups: list[list[str]]) -> None:
        self._groups = groups
        self._input: tuple[Tensor, int] | None = None  # and its version, as it may be written to in between

    def called(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen = (args[0], args[0]._version) if args else None
            if seen and self._input and seen[0] is self._input[0] and seen[1] == self._input[1]:
                self._groups[-1].append(name)
            else:
                self._groups.append([name])
            self._input = seen

        return hook


class _Flow(TorchDispatchMode):
    """Tracks through every operation where its inputs come from: layer numbers, or :data:`START`."""

    def __init__(self, trace: Trace, count: int) -> None:
        super().__init__()
        self.trace = trace
        self.count = count
        self.last = START  # the layer that was entered last
        self.inside = False
        self.received: list[Tensor] = []  # those arguments of the running layer that travel between stages
        self.sources: dict[int, frozenset[int]] = {}
        self.alive: list[Tensor] = []  # so that no id is reused

    def mark(self, tensors: Iterable[Tensor], sources: Iterable[int]) -> None:
        for tensor in tensors:
            self.sources[id(tensor)] = frozenset(sources)
            self.alive.append(tensor)

    def enter(self, number: int, hidden: Tensor, occurrences: int) -> None:
        # What runs between two layers runs on the earlier one's stage.
        self._use(self._sources_of(hidden), self.last)
        if occurrences > 1:  # a stage replaces only the first argument with the hidden states that it received
            self._use({self.last}, number)
        self.last, self.inside, self.received = number, True, [hidden]

    def give(self, arguments: Iterable[tuple[int | str, Any]]) -> list[int | str]:
        """Return which arguments of the entered layer only the first stage computes; count them as received."""
        (hidden,) = self.received
        tensors = [(place, value) for place, value in arguments if isinstance(value, Tensor) and value is not hidden]
        made = [(place, t) for place, t in tensors if t.is_floating_point() and self._sources_of(t) == {START}]
        self.received += [tensor for _, tensor in made]
        return [place for place, _ in made]

    def leave(self, beside: Iterable[Tensor]) -> None:
        """Leave the layer, which returns ``beside`` with the hidden states, whether computed or passed through."""
        self.inside = False
        self.mark(beside, {self.last})  # a stage without the layer has None there

    def _sources_of(self, tensor: Tensor) -> frozenset[int]:
        if self.inside and any(tensor is each for each in self.received):
            return frozenset()  # travels between stages; outside the layer, it belongs to the earlier stage
        return self.sources.get(id(tensor), frozenset())

    def finish(self, logits: Tensor) -> None:
        self._use(self._sources_of(logits), self.last)

    def _use(self, sources: Iterable[int], user: int) -> None:
        self.trace.carried.update((source, user) for source in sources if source != user)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        sources: frozenset[int] = frozenset()
        if not name.endswith("_like") and not name.startswith("new_"):  # these use shapes, not values
            weights = self.last == self.count - 1 and not self.inside
            for tensor in tensors_in((args, kwargs)):
                # Weights used after the last layer (norm, head, tied embedding) are on its stage.
                if not (weights and isinstance(tensor, nn.Parameter)):
                    sources |= self._sources_of(tensor)
        if self.inside:
            self._use(sources, self.last)
            sources = frozenset({self.last})
        self.mark(tensors_in(output), sources)
        return output


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation, also in lists, tuples and dictionaries.

    torch._pytree knows more kinds of containers, but takes longer than the operations themselves.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for each in value for tensor in tensors_in(each)]
