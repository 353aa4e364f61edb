"""What each layer of a pipeline takes, found out by training a stage of it on the meta device."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.adapters.selection import parse_layers
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.stage import Stage
from lightning_pipelite.plan.meter import BLOCK, AttentionAsOnGPU, Meter

META = torch.device("meta")
DOCUMENTS = 16  # of a micro-batch: how many there are makes no difference, but that they are several does


@dataclass
class Part:
    """What a part of a stage takes for one micro-batch: one item of layers, or what comes before or after them.

    Attributes:
        parameters: The number of weights of the base model.
        weights: Bytes of all parameters and buffers, 4-bit ones with the scales of their blocks.
        trained: The number of trained parameters.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer's state.
        retained: Bytes that a forward keeps for the backward pass.
        forward: The most bytes at once in the forward pass, beside all that was held before it.
        backward: The most bytes at once in the backward pass, beside all that was held before it; the gradients of the
            parameters are there already.
        first_backward: The same where they are not, those that it makes included.
        flops: Floating-point operations forward and backward, by the size of the elements in bytes.
        moved: Bytes that the other operations read and write.
    """

    parameters: int = 0
    weights: int = 0
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    retained: int = 0
    forward: int = 0
    backward: int = 0
    first_backward: int = 0
    flops: dict[int, float] = field(default_factory=dict)
    moved: int = 0


@dataclass
class Trial:
    """A stage of one item.

    Attributes:
        entry: What comes before the item.
        item: The item.
        tail: What comes after it.
        hidden: Bytes of what is handed on to the next stage.
        unsaved: Bytes of the item's input, if the item does not keep it for its backward pass.
        handover: Bytes that the tail's backward leaves beside what was retained before it: the gradient of its input.
        first_handover: The same with the gradients of its parameters, which are made then.
        tied: What of the tail is the embedding's weight; a stage that has both holds it once.
    """

    entry: Part
    item: Part
    tail: Part
    hidden: int
    unsaved: int
    handover: int
    first_handover: int = 0
    tied: Part = field(default_factory=Part)

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.entry, self.item, self.tail


class Simulation:
    """Trains stages of one item each, which are built as those that are trained, but without weights.

    Every kind of item is tried once for each policy of activation memory and length.

    Args:
        layers: The layers of the model.
        loss: The loss on what the last stage returns.
        make_optimizer: Makes the optimizer of some parameters.
    """

    def __init__(
        self,
        layers: CausalLMLayers,
        loss: Callable[[Any, Any], Any],
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.layers = layers
        self._loss = loss
        self._make_optimizer = make_optimizer
        self._trials: dict[Any, Trial] = {}
        kinds: dict[Any, int] = {}
        self._kinds = [kinds.setdefault(self._kind(number), len(kinds)) for number in range(len(layers))]

    def trial(self, number: int, policy: str, sequence_len: int, *, input_grad: bool = True) -> Trial:
        """Return what item ``number`` takes.

        Args:
            number: of the item.
            policy: the activation memory.
            sequence_len: tokens of a micro-batch.
            input_grad: whether the backward pass goes on before the item; matters but for the first one.
        """
        if policy == "selective" and self.compiled:
            policy = "keep"  # it is the compiler that selects
        last = len(self.layers) - 1
        key = (self._kinds[number], number == 0, number == last, policy, sequence_len, input_grad)
        if key not in self._trials:
            if policy == "offload":
                self._trials[key] = _offloaded(self.trial(number, "recompute", sequence_len, input_grad=input_grad))
            else:
                with self._uncompiled(policy):
                    stage = self.layers.build_stage(number, number + 1, META)
                self._trials[key] = self._try(stage, number, sequence_len, input_grad)
        return self._trials[key]

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled on a GPU."""
        return self.layers._compile is not False

    def _kind(self, number: int) -> Any:
        """What tells apart items that take differently much."""
        skeleton, adapter = self.layers.skeleton, self.layers.adapter
        first, after = skeleton.groups[number], skeleton.groups[number + 1]
        names = getattr(adapter, "target_modules", None)
        if isinstance(names, str) and names != "all-linear":  # may name some layers only
            return number
        chosen = parse_layers(getattr(adapter, "layers_to_transform", None), len(skeleton.layers))
        return tuple((_signature(skeleton.layers[n]), n in chosen) for n in range(first, after))

    @contextlib.contextmanager
    def _uncompiled(self, policy: str) -> Iterator[None]:
        """Build stages as a GPU would, but for compiling them."""
        layers = self.layers
        before = layers.activation_memory, layers._compile, torch.get_num_threads()
        layers.activation_memory, layers._compile = policy, False  # type: ignore[assignment]
        torch.set_num_threads(1)  # what is computed is tiny
        try:
            yield
        finally:
            layers.activation_memory, layers._compile, threads = before
            torch.set_num_threads(threads)

    def _try(self, stage: Stage, number: int, sequence_len: int, input_grad: bool) -> Trial:
        meter = Meter()
        loss = self._loss if number == len(self.layers) - 1 else None
        with AttentionAsOnGPU(), meter:
            meter.hold(*held_tensors(stage))
            skeleton = self.layers.skeleton
            run = _Run(stage, meter, skeleton.layers_name, skeleton.tail_names, loss, compiled=self.compiled)
            if self.layers.packed:
                stage.expect_documents(DOCUMENTS)
            # The second micro-batch finds gradients that it adds to.
            first, second = (run.train(lambda: self._inputs(stage, sequence_len, input_grad)) for _ in range(2))
        for part, before in zip(second.parts, first.parts, strict=True):
            part.first_backward = before.backward
        second.first_handover = first.handover
        self._weigh(second, stage)
        return second

    def _inputs(self, stage: Stage, sequence_len: int, input_grad: bool) -> tuple[Tensor, ...]:
        layers = self.layers
        ids = [torch.empty(1, sequence_len, dtype=torch.int64, device=META) for _ in range(2)]
        extra = [torch.empty_like(ids[0]) for _ in layers.adapter.batch_keys]
        if stage.start == 0:
            return (*ids, *extra)
        size = layers.skeleton.model.get_submodule(layers.skeleton.embedding_name).weight.shape[1]
        size = getattr(layers.skeleton.config, "hidden_size", size)
        # As between two items: not a leaf, which the graph would hold whether the item keeps it or not.
        source = torch.empty(1, 1, 1, dtype=layers.dtype, device=META, requires_grad=input_grad)
        hidden = source.expand(1, sequence_len, size).clone()
        sums = []
        if layers.router_loss is not None:
            sums = [torch.empty(2, layers.router_loss.experts, device=META, requires_grad=True)]
        return (hidden, ids[1], *extra, *sums)

    def _weigh(self, trial: Trial, stage: Stage) -> None:
        """Fill in what the parameters of each part take, whatever the micro-batch is."""
        prefix = f"causal_lm.{self.layers.skeleton.layers_name}."
        whole = dict(self.layers.skeleton.model.named_parameters())
        start_names = self.layers.skeleton.start_names
        parts: dict[int, list[tuple[str, Tensor]]] = {0: [], 1: [], 2: []}

        def place(name: str) -> int:
            if name.startswith(prefix):
                return 1
            module = name.removeprefix("causal_lm.").rpartition(".")[0]
            return 0 if stage.start == 0 and module in start_names else 2

        for name, tensor in stage.named_parameters():
            parts[place(name)].append((name, tensor))
        for index, part in enumerate(trial.parts):
            own = [p for _, p in parts[index]]
            part.weights = sum(_rounded(t) for t in {id(t): t for t in own}.values())
            trained = [p for p in own if p.requires_grad]
            part.trained = sum(p.numel() for p in trained)
            part.gradients = sum(_rounded(p) for p in trained)
            part.optimizer = self._optimizer_bytes(trained)  # type: ignore[arg-type]
        embedding = f"causal_lm.{self.layers.skeleton.embedding_name}.weight"
        for parameter in (p for name, p in parts[2] if name == embedding):
            trained = [parameter] if parameter.requires_grad else []
            trial.tied = Part(
                parameter.numel(),
                _rounded(parameter),
                sum(p.numel() for p in trained),
                sum(map(_rounded, trained)),
                self._optimizer_bytes(trained),  # type: ignore[arg-type]
            )
        states = [t for module in stage.modules() for t in _quantisation_states(module)]
        trial.item.weights += sum(_rounded(t) for t in {id(t): t for t in states}.values())
        trial.entry.weights += sum(_rounded(buffer) for buffer in stage.buffers())
        skeleton = self.layers.skeleton
        first, after = stage.start, stage.stop
        trial.item.parameters = sum(p.numel() for layer in skeleton.layers[first:after] for p in layer.parameters())
        outside = {n: p for n, p in whole.items() if skeleton.layer_of(n) is None}
        for index, part in ((0, trial.entry), (2, trial.tail)):
            names = {name.removeprefix("causal_lm.") for name, _ in parts[index]}
            part.parameters = sum(p.numel() for n, p in outside.items() if n in names)

    def _optimizer_bytes(self, trained: list[nn.Parameter]) -> int:
        if not trained:
            return 0
        optimizer = self._make_optimizer(trained)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        for parameter in trained:
            parameter.grad = None
        return sum(_rounded(t) for t in tensors if t.is_meta)


@dataclass
class _Event:
    """Where a run has come to.

    Attributes:
        peak: The most bytes since the event before.
        live: Bytes that are held now.
        flops: All that was computed so far.
        moved: All bytes that were moved so far.
    """

    peak: int
    live: int
    flops: dict[int, float]
    moved: int


class _Run:
    """Trains a stage of one item, and notes where its forward and its backward enter and leave the item.

    Args:
        stage: On the meta device.
        meter: Counts what the run does.
        layers_name: Of the list of decoder layers in the stage's model.
        tail_names: Of the modules after it.
        loss: The loss on the stage's outputs, if it is the last.
        compiled: Whether each layer is compiled on a GPU.
    """

    def __init__(
        self,
        stage: Stage,
        meter: Meter,
        layers_name: str,
        tail_names: Sequence[str],
        loss: Callable[[Any, Any], Any] | None,
        *,
        compiled: bool,
    ) -> None:
        self._stage, self._meter, self._loss, self._compiled = stage, meter, loss, compiled
        self._events: dict[str, _Event] = {}
        layers: Any = stage.causal_lm.get_submodule(layers_name)
        for number in range(stage.start, stage.stop):
            layers[number].register_forward_pre_hook(self._enter, with_kwargs=True)
            layers[number].register_forward_hook(partial(self._returned, number == stage.stop - 1))
        # Not when the layer returns: it still holds then what is freed at once.
        following = [stage.causal_lm.get_submodule(name) for name in tail_names] if loss else [layers[stage.stop]]
        for module in following:
            module.register_forward_pre_hook(lambda *_: self._note("leave"))

    def train(self, make_inputs: Callable[[], tuple[Tensor, ...]]) -> Trial:
        """Train on a micro-batch."""
        self._events = {}
        self._note("begin")
        inputs = make_inputs()
        outputs = self._stage(inputs)
        if self._loss is not None:
            outputs = self._loss(outputs, torch.empty(inputs[1].shape, dtype=torch.int64, device=META))[:1]
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
        return self._trial(hidden, unsaved)

    def _note(self, name: str) -> None:
        if name not in self._events:
            meter = self._meter
            self._events[name] = _Event(meter.mark(), meter.live, dict(meter.flops), meter.moved)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "forward" in self._events:  # it is run again in the backward pass
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
        """In the backward pass, the gradient of a layer's output or of the first one's input is there."""
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
            Part(retained=after.live - before.live, forward=after.peak - before.live)
            for before, after in itertools.pairwise((begin, enter, leave, forward))
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
        return Trial(entry, item, tail, hidden, unsaved, max(0, item_backward.live - settled))


def _offloaded(trial: Trial) -> Trial:
    """What a recomputed item takes if its input waits in the host's memory, and the next one's comes back meanwhile."""
    hidden = max(trial.hidden, trial.item.retained)
    item = replace(
        trial.item,
        retained=0,
        backward=trial.item.backward + 2 * hidden,
        first_backward=trial.item.first_backward + 2 * hidden,
    )
    return replace(trial, item=item)


def _signature(layer: nn.Module) -> Any:
    """What tells decoder layers apart: their modules, shapes and options, but for their number."""
    plain = (int, float, str, bool, type(None))
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
            tuple((k, v) for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_" and "idx" not in k),
        )
        for name, module in layer.named_modules()
    )


def held_tensors(stage: nn.Module) -> list[Tensor]:
    """Return all tensors that a stage holds: parameters, buffers, and the scales of 4-bit weights."""
    states = (t for module in stage.modules() for t in _quantisation_states(module))
    return [*stage.parameters(), *stage.buffers(), *states]


def _quantisation_states(module: nn.Module) -> Iterator[Tensor]:
    states = [getattr(p, "quant_state", None) for p in module.parameters(recurse=False)]
    states.append(vars(module).get("quant_state"))
    for state in {id(state): state for state in states if state is not None}.values():
        yield from (t for t in vars(state).values() if isinstance(t, Tensor))
        if state.nested:
            yield from (t for t in vars(state.state2).values() if isinstance(t, Tensor))


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK
