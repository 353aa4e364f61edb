"""Measures what each layer of a pipeline takes by training a stage of that layer on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.adapters.selection import parse_layers
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layer_signature import layer_signature
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.memory import set_activation_memory
from lightning_pipelite.models.stage import Stage
from lightning_pipelite.optim.offloaded import BUCKET, PLACES, OffloadedOptimizer
from lightning_pipelite.planning.gpus import REFERENCE, Gpu
from lightning_pipelite.planning.meter import BLOCK
from lightning_pipelite.planning.trial import Part, Trial
from lightning_pipelite.planning.watched_stage import WatchedStage, quantisation_states

META = torch.device("meta")
GPU_ONLY = ("fused", "capturable", "triton")  # options of optimizers; none of them changes the state
DOCUMENTS = 16  # per micro-batch; the number makes no difference if it is more than 1


class Simulation:
    """Trains stages of one item each, built like real ones but without weights.

    Each signature of items is built once, and tried once for each activation memory policy and sequence length.

    Args:
        layers: The layers of the model.
        loss: The loss on the last stage's output.
        make_optimizer: Creates the optimizer of the given parameters.
        gpu: The GPU whose speed is assumed.
    """

    def __init__(
        self,
        layers: CausalLMLayers,
        loss: Callable[[Any, Any], Any],
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        gpu: Gpu = REFERENCE,
    ) -> None:
        self.layers, self.gpu = layers, gpu
        self._loss = loss
        self._make_optimizer = make_optimizer
        self._built: dict[Any, WatchedStage] = {}
        self._trials: dict[Any, Trial] = {}
        numbers: dict[Any, int] = {}
        self._signatures = [numbers.setdefault(self._signature(n), len(numbers)) for n in range(len(layers))]

    def trial(
        self, number: int, policy: str, sequence_len: int, *, input_grad: bool = True, first: bool = False
    ) -> Trial:
        """Return what item ``number`` takes.

        Args:
            number: Number of the item.
            policy: Activation memory policy.
            sequence_len: Tokens per micro-batch.
            input_grad: Whether the backward pass continues to earlier items; irrelevant for the first item.
            first: Whether the micro-batch is the first of a step, whose backward pass allocates the gradients that the
                others accumulate into.
        """
        if policy == "selective" and self.compiled:
            policy = "keep"  # the compiler selects
        if policy == "offload":
            return _offloaded(self.trial(number, "recompute", sequence_len, input_grad=input_grad, first=first))
        built = (self._signatures[number], number == 0, number == len(self.layers) - 1)
        key = (built, policy, sequence_len, input_grad, first)
        if key not in self._trials:
            if built not in self._built:
                self._built[built] = self._build(number)
            it = self._built[built]
            set_activation_memory(it.layers, policy, META, compiled=False)
            ids = torch.empty(1, sequence_len, dtype=torch.int64, device=META)
            received = it.received_like(ids)
            self._trials[key] = it.train(lambda: self._inputs(received, ids, input_grad), first=first)
        return self._trials[key]

    def on(self, layers: CausalLMLayers) -> Simulation:
        """Return a simulation of other layers with the same loss and optimizer."""
        return Simulation(layers, self._loss, self._make_optimizer, self.gpu)

    def with_offloaded_optimizer(self) -> Simulation | None:
        """Return the same simulation with the optimizer state on the host; None if it already is, or cannot be."""
        try:
            made = self._make_optimizer([nn.Parameter(torch.empty(1, device=META))])
            if isinstance(made, OffloadedOptimizer):
                return None
            OffloadedOptimizer(made)
        except ConfigurationError:
            return None
        make = self._make_optimizer
        return Simulation(self.layers, self._loss, lambda parameters: OffloadedOptimizer(make(parameters)), self.gpu)

    @cached_property  # every trial reads it, and examining a large model takes long
    def compiled(self) -> bool:
        """Whether layers are compiled on a GPU."""
        return self.layers.compiles_on(torch.device("cuda"))

    def _signature(self, number: int) -> Any:
        """Return a key that distinguishes items which take different amounts."""
        meta_model, adapter = self.layers.meta_model, self.layers.adapter
        first, after = meta_model.groups[number], meta_model.groups[number + 1]
        names = getattr(adapter, "target_modules", None)
        if isinstance(names, str) and names != "all-linear":  # may name some layers only
            return number
        chosen = parse_layers(getattr(adapter, "layers_to_transform", None), len(meta_model.layers))
        return tuple((layer_signature(meta_model.layers[n]), n in chosen) for n in range(first, after))

    @contextlib.contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Build stages as on a GPU, but uncompiled; their layers can be recomputed."""
        layers = self.layers
        before = layers.activation_memory, layers.compile_layers, torch.get_num_threads()
        layers.activation_memory, layers.compile_layers = "recompute", False
        torch.set_num_threads(1)  # the computations are tiny
        try:
            yield
        finally:
            layers.activation_memory, layers.compile_layers, threads = before
            torch.set_num_threads(threads)

    def _build(self, number: int) -> WatchedStage:
        with self._uncompiled():
            stage = self.layers.build_stage(number, number + 1, META)
        if self.layers.packed:
            stage.expect_documents(DOCUMENTS)
        loss = self._loss if number == len(self.layers) - 1 else None
        meta_model = self.layers.meta_model
        weighed = self._weigh(stage)
        return WatchedStage(stage, weighed, meta_model.layers_name, meta_model.tail_names, loss, compiled=self.compiled)

    def _inputs(self, received: Tensor, ids: Tensor, input_grad: bool) -> tuple[Tensor, ...]:
        """Return new inputs of a stage that receives tensors like ``received``, which is ``ids`` for the first."""
        layers = self.layers
        positions, *extra = (torch.empty_like(ids) for _ in range(1 + len(layers.adapter.batch_keys)))
        if received is ids:
            return (torch.empty_like(ids), positions, *extra)
        # Not a leaf, as between two items: the graph would hold a leaf even if the item does not save it.
        source = torch.empty(1, dtype=layers.dtype, device=META, requires_grad=input_grad)
        hidden = source.expand(received.shape).clone()
        sums = []
        if layers.router_loss is not None:
            sums = [torch.empty(2, layers.router_loss.experts, device=META, requires_grad=True)]
        return (hidden, positions, *extra, *sums)

    def _weigh(self, stage: Stage) -> Trial:
        """Return what the parameters and buffers of each part take, regardless of the micro-batch."""
        trial = Trial(Part(), Part(), Part())
        prefix = f"causal_lm.{self.layers.meta_model.layers_name}."
        whole = dict(self.layers.meta_model.model.named_parameters())
        start_names = self.layers.meta_model.start_names
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
            vars(part).update(self._optimizer_bytes(trained))  # type: ignore[arg-type]
        embedding = f"causal_lm.{self.layers.meta_model.embedding_name}.weight"
        for parameter in (p for name, p in parts[2] if name == embedding):
            trained = [parameter] if parameter.requires_grad else []
            trial.tied = Part(
                parameter.numel(),
                _rounded(parameter),
                sum(p.numel() for p in trained),
                sum(map(_rounded, trained)),
                **self._optimizer_bytes(trained),  # type: ignore[arg-type]
            )
        states = [t for module in stage.modules() for t in quantisation_states(module)]
        trial.item.weights += sum(_rounded(t) for t in {id(t): t for t in states}.values())
        for name, buffer in stage.named_buffers():
            part = trial.item if name.startswith(prefix) else trial.entry
            part.weights += _rounded(buffer)
        meta_model = self.layers.meta_model
        first, after = stage.start, stage.stop
        trial.item.parameters = sum(p.numel() for layer in meta_model.layers[first:after] for p in layer.parameters())
        outside = {n: p for n, p in whole.items() if meta_model.layer_of(n) is None}
        for index, part in ((0, trial.entry), (2, trial.tail)):
            names = {name.removeprefix("causal_lm.") for name, _ in parts[index]}
            part.parameters = sum(p.numel() for n, p in outside.items() if n in names)
        return trial

    def _optimizer_bytes(self, trained: list[nn.Parameter]) -> dict[str, int]:
        """Return the fields of a :class:`Part` for the optimizer state."""
        if not trained:
            return {}
        optimizer = self._make_optimizer(trained)
        for group in optimizer.param_groups:
            group.update({option: False for option in GPU_ONLY if option in group})
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        for parameter in trained:
            parameter.grad = None
        state = sum(_rounded(t) for t in tensors if t.is_meta)
        if not isinstance(optimizer, OffloadedOptimizer):
            return {"optimizer": state}
        # One place more for the temporaries of an update.
        at_once = (PLACES + 1) * max(BUCKET, *(p.nbytes for p in trained)) * state // sum(p.nbytes for p in trained)
        return {"optimizer_on_host": state, "optimizer_passing": min(state, at_once)}


def _offloaded(trial: Trial) -> Trial:
    """Return what a recomputed item takes if its input is in host memory while the next one's is copied back."""
    hidden = max(trial.hidden, trial.item.retained)
    item = replace(trial.item, retained=0, backward=trial.item.backward + 2 * hidden)
    return replace(trial, item=item, offloaded=hidden)


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK
