"""Trains a stage on the meta device and measures what each part of it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.models.stage import Stage
from lightning_pipelite.planning.meter import Meter, as_on_gpu
from lightning_pipelite.planning.trial import Trial


@dataclass
class Event:
    """The readings of the meter at a point of a run.

    Attributes:
        peak: Peak bytes since the previous event.
        live: Bytes that are held now.
        flops: Floating-point operations so far, by element size in bytes.
        moved: Bytes moved so far.
    """

    peak: int
    live: int
    flops: dict[int, float]
    moved: int


class WatchedStage:
    """Trains a stage of one item, and records events as its forward and backward passes enter and leave the item.

    Args:
        stage: The stage, on the meta device.
        weighed: What its parameters take.
        layers_name: Name of the list of decoder layers in the stage's model.
        tail_names: Names of the modules after that list.
        loss: The loss on the stage's outputs, if it is the last.
        compiled: Whether each layer is compiled on a GPU.

    Attributes:
        stage: The stage.
        layers: Its decoder layers.
    """

    def __init__(
        self,
        stage: Stage,
        weighed: Trial,
        layers_name: str,
        tail_names: Sequence[str],
        loss: Callable[[Any, Any], Any] | None,
        *,
        compiled: bool,
    ) -> None:
        self.stage, self._weighed, self._loss, self._compiled = stage, weighed, loss, compiled
        self._meter = Meter()
        self._events: dict[str, Event] = {}
        layers: Any = stage.causal_lm.get_submodule(layers_name)
        self.layers: list[nn.Module] = [*layers[stage.start : stage.stop]]
        for number in range(stage.start, stage.stop):
            layers[number].register_forward_pre_hook(self._enter, with_kwargs=True)
            layers[number].register_forward_hook(partial(self._returned, number == stage.stop - 1))
        # Not when the layer returns, as it then still holds tensors that are about to be freed.
        following = [stage.causal_lm.get_submodule(name) for name in tail_names] if loss else [layers[stage.stop]]
        for module in following:
            module.register_forward_pre_hook(lambda *_: self._note("leave"))

    def received_like(self, ids: Tensor) -> Tensor:
        """Return a tensor like the first one that the stage receives; the tokens ``ids`` if it is the first stage."""
        if self.stage.start == 0:
            return ids
        with as_on_gpu(), Meter():  # the meter supplies values, which the meta device lacks
            return self.stage.received_like(ids)

    def train(self, make_inputs: Callable[[], tuple[Tensor, ...]], *, first: bool) -> Trial:
        """Train on a micro-batch, and return what this takes.

        Args:
            make_inputs: Creates the stage's inputs.
            first: Whether the backward pass allocates the parameters' gradients, rather than accumulating into those
                of the micro-batch before.
        """
        self._events = {}
        trained = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = None if first else torch.empty_like(parameter)
        self._meter = Meter()
        with as_on_gpu(), self._meter:
            self._meter.hold(*held_tensors(self.stage))
            hidden, unsaved = self._train(make_inputs)
        for parameter in trained:
            parameter.grad = None
        return self._trial(hidden, unsaved)

    def _train(self, make_inputs: Callable[[], tuple[Tensor, ...]]) -> tuple[int, int]:
        """Run both passes; return the bytes sent on, and the bytes of the inputs that the stage does not save."""
        self._note("begin")
        inputs = make_inputs()
        outputs = self.stage(inputs)
        if self._loss is not None:
            outputs = self._loss(outputs, torch.empty(inputs[1].shape, dtype=torch.int64, device="meta"))[:1]
        self._note("forward")
        hidden = sum(t.nbytes for t in outputs) if self._loss is None else 0
        held = self._meter.live
        del inputs
        unsaved = held - self._meter.live
        handed = [t for t in outputs if t.is_floating_point() and t.requires_grad]
        del outputs
        if handed:
            gradients = [torch.empty_like(t) if self._loss is None else None for t in handed]
            torch.autograd.backward(handed, gradients)
            del gradients
        self._meter.fused = False
        self._note("end")
        return hidden, unsaved

    def _note(self, name: str) -> None:
        if name not in self._events:
            meter = self._meter
            self._events[name] = Event(meter.mark(), meter.live, dict(meter.flops), meter.moved)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "forward" in self._events:  # recomputation in the backward pass
            return
        if "enter" not in self._events:
            self._note("enter")
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(partial(self._passed, "entry backward", False))
        self._meter.fused = self._compiled

    def _returned(self, last: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if "forward" in self._events:
            return
        self._meter.fused = False
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        self._meter.hold(hidden)
        if hidden.requires_grad:
            hidden.register_hook(partial(self._passed, "item backward" if last else None, self._compiled))

    def _passed(self, event: str | None, fused: bool, gradient: Tensor) -> None:
        """Record that the backward pass has the gradient of a layer's output, or of the first layer's input."""
        self._meter.hold(gradient)
        self._meter.fused = fused
        if event is not None:
            self._note(event)

    def _trial(self, hidden: int, unsaved: int) -> Trial:
        events = self._events
        begin, enter, leave, forward, end = (events[n] for n in ("begin", "enter", "leave", "forward", "end"))
        item_backward = events.get("item backward", end)
        entry_backward = events.get("entry backward", end)
        entry, item, tail = (
            replace(part, retained=after.live - before.live, forward=after.peak - before.live)
            for part, (before, after) in zip(
                self._weighed.parts, itertools.pairwise((begin, enter, leave, forward)), strict=True
            )
        )
        tail.backward = item_backward.peak - forward.live
        if entry_backward is not item_backward:
            item.backward = entry_backward.peak - item_backward.live
        if end is not entry_backward:
            entry.backward = end.peak - entry_backward.live
        passes = ((begin, enter, entry_backward, end), (enter, leave, item_backward, entry_backward))
        for part, (a, b, c, d) in zip(
            (entry, item, tail), (*passes, (leave, forward, forward, item_backward)), strict=True
        ):
            part.moved = b.moved - a.moved + d.moved - c.moved
            part.flops = {
                width: b.flops.get(width, 0.0) - a.flops.get(width, 0.0) + total - c.flops.get(width, 0.0)
                for width, total in d.flops.items()
            }
        settled = leave.live + min(0, tail.retained)
        handover = max(0, item_backward.live - settled)
        return Trial(entry, item, tail, hidden, unsaved, handover, self._weighed.tied)


def held_tensors(stage: nn.Module) -> list[Tensor]:
    """Return all tensors that a stage holds: parameters, gradients, buffers, and the scales of 4-bit weights."""
    gradients = (p.grad for p in stage.parameters() if p.grad is not None)
    states = (t for module in stage.modules() for t in quantisation_states(module))
    return [*stage.parameters(), *gradients, *stage.buffers(), *states]


def quantisation_states(module: nn.Module) -> Iterator[Tensor]:
    """Yield the scales of a module's 4-bit weights, and the scales of those scales."""
    states = [getattr(p, "quant_state", None) for p in module.parameters(recurse=False)]
    states.append(vars(module).get("quant_state"))
    for state in {id(state): state for state in states if state is not None}.values():
        yield from (t for t in vars(state).values() if isinstance(t, Tensor))
        if state.nested:
            yield from (t for t in vars(state.state2).values() if isinstance(t, Tensor))
