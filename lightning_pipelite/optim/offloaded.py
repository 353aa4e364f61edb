"""An optimizer whose state waits in the host's memory between its steps."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import optimi
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.optim.groups import OptimizerFactory

BUCKET = 64 * 2**20
"""Bytes of the parameters that are updated at once; one larger than this is updated alone."""
BUCKETS = 3
"""How many have their state on the device at once: one that comes, one that is updated, one that leaves."""

UPDATE_EACH_ALONE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adafactor,
    optimi.Adam, optimi.AdamW, optimi.Adan, optimi.Lion, optimi.RAdam, optimi.SGD, optimi.StableAdamW,
)  # fmt: skip
"""Optimizers that update a parameter by its own gradient and state, and by what its group counts, alone."""


class OffloadedOptimizer(Optimizer):
    """Steps another optimizer a few parameters at a time, whose state is brought to the device for that and taken back.

    The weights after a step are those that the optimizer itself would give. Copies run beside the computation in both
    directions; a step ends when all state is in the host's memory again, page-locked. As in ZeRO-Offload
    (https://arxiv.org/abs/2101.06840) but for where the update is computed: on the GPU, whose memory is free of
    activations by then. Parameters on the CPU have their state there anyway.

    Args:
        inner: The optimizer. What it keeps is shared: its groups are this one's, and its state.

    Raises:
        ConfigurationError: If it is none that is known to update each parameter alone.
    """

    def __init__(self, inner: Optimizer) -> None:
        if type(inner) not in UPDATE_EACH_ALONE:
            names = ", ".join(f"{kind.__module__.partition('.')[0]}'s {kind.__name__}" for kind in UPDATE_EACH_ALONE)
            raise ConfigurationError(
                f"model.offload_optimizer is not known to go with {type(inner).__name__}: leave it out, or use one of "
                f"{names}."
            )
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self._host: dict[tuple[Parameter, str], Tensor] = {}  # where the state of a parameter on a GPU waits
        self._copies: _Copies | None = None
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.inner.param_groups
        device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
        if device.type == "cuda" and self._copies is None:
            self._copies = _Copies(device)
        try:
            for group in groups:
                self._step_group(group, self._copies)
        finally:
            self.inner.param_groups = groups
        if self._copies is not None:
            self._copies.finish()
        return loss

    def _step_group(self, group: dict[str, Any], copies: _Copies | None) -> None:
        """Update a group, each bucket by what the group has counted before."""
        everything = group["params"]
        before = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        changed: dict[str, Any] = {}
        buckets = [*_buckets([p for p in everything if p.grad is not None])]
        self.inner.param_groups = [group]
        try:
            for number, bucket in enumerate(buckets):
                if copies is not None:
                    for each in buckets[number : number + 2]:
                        self._bring(each, copies)
                for key in group.keys() - before.keys() - {"params"}:
                    del group[key]
                group.update(copy.deepcopy(before), params=bucket)
                self.inner.step()
                changed |= {key: group[key] for key in group if key != "params" and _differ(group[key], before, key)}
                if copies is not None:
                    self._take_back(bucket, copies)
        finally:
            group.update(changed, params=everything)

    def put_away(self, parameter: Parameter, name: str, value: Tensor) -> None:
        """Keep a part of a parameter's state, read from a checkpoint, where it waits for the next step."""
        if parameter.is_cuda:
            value = self._waiting(parameter, name, value).copy_(value)
        self.inner.state[parameter][name] = value

    def _waiting(self, parameter: Parameter, name: str, like: Tensor) -> Tensor:
        held = self._host.get((parameter, name))
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            held = torch.empty_like(like, device="cpu", pin_memory=True)
            self._host[parameter, name] = held
        return held

    def _bring(self, bucket: list[Parameter], copies: _Copies) -> None:
        """Start to copy the bucket's state to the device, if that has not been done."""
        away = [
            (parameter, name, value)
            for parameter in bucket
            for name, value in self.inner.state.get(parameter, {}).items()
            if value is self._host.get((parameter, name)) and value is not None
        ]
        if not away:
            return
        arrived = copies.bring([value for *_, value in away])
        for (parameter, name, _), value in zip(away, arrived, strict=True):
            self.inner.state[parameter][name] = value

    def _take_back(self, bucket: list[Parameter], copies: _Copies) -> None:
        here = [
            (parameter, name, value)
            for parameter in bucket
            for name, value in self.inner.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.is_cuda
        ]
        waiting = [self._waiting(*each) for each in here]
        copies.take_back([value for *_, value in here], waiting)
        for (parameter, name, _), held in zip(here, waiting, strict=True):
            self.inner.state[parameter][name] = held

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the inner optimizer; it leaves the device with the next step."""
        self.inner.load_state_dict(state_dict)
        self._share()


class _Copies:
    """Copies between a GPU and the host's page-locked memory on two streams of their own.

    They are kept: torch gives memory that was freed to the stream again that it was allocated for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: deque[torch.cuda.Event] = deque()
        self._coming: torch.cuda.Event | None = None

    def bring(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return them on the device; what is launched from now on waits until they are there."""
        while len(self._leaving) > BUCKETS - 2:  # or the host would allocate all of them before the first has left
            self._leaving.popleft().synchronize()
        with torch.cuda.stream(self._in):
            arrived = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self._device)
        for tensor in arrived:
            tensor.record_stream(current)
        current.wait_stream(self._in)
        return arrived

    def take_back(self, tensors: list[Tensor], held: list[Tensor]) -> None:
        """Copy them to the host once what is launched now is done; their memory is free after that."""
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for tensor, place in zip(tensors, held, strict=True):
                place.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)
        self._leaving.append(self._out.record_event())

    def finish(self) -> None:
        """Wait until everything has left: what saves a checkpoint reads it."""
        self._out.synchronize()


def offload_state(factory: OptimizerFactory) -> OptimizerFactory:
    """Return what makes the same optimizers, with their state in the host's memory."""

    def make(*args: Any, **kwargs: Any) -> Optimizer:
        return OffloadedOptimizer(factory(*args, **kwargs))

    return make


def class_of(optimizer: Optimizer) -> type[Optimizer]:
    """Return the class that computes the update."""
    return type(optimizer.inner if isinstance(optimizer, OffloadedOptimizer) else optimizer)


def _buckets(parameters: list[Parameter]) -> Iterator[list[Parameter]]:
    bucket: list[Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def _differ(value: Any, before: dict[str, Any], key: str) -> bool:
    if key not in before:
        return True
    if isinstance(value, Tensor) and isinstance(before[key], Tensor):
        return not torch.equal(value, before[key])
    return bool(value != before[key])
