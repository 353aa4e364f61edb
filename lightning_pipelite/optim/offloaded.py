"""An optimizer whose state is kept in host memory between steps."""

from __future__ import annotations

import copy
import itertools
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
from lightning_pipelite.optim.state_copies import Place, StateCopies, bytes_in_place

BUCKET = 64 * 2**20
"""Bytes of parameters that are updated at once; a larger parameter is updated alone."""
PLACES = 2
"""Number of buckets whose state is on the device at once: the next is copied in while one is updated and copied out."""

UPDATE_EACH_ALONE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adafactor,
    optimi.Adam, optimi.AdamW, optimi.Adan, optimi.Lion, optimi.RAdam, optimi.SGD, optimi.StableAdamW,
)  # fmt: skip
"""Optimizers that update a parameter only from its own gradient and state, and its group's options and counters."""


class OffloadedOptimizer(Optimizer):
    """Steps another optimizer a few parameters at a time, copying their state to the device and back.

    The weights after a step are the same as without offload. Copies in both directions overlap with computation, and
    the host does not wait: work after the step is launched while state is still being copied out to page-locked memory;
    only reading :attr:`state` waits until all of it has arrived. As in ZeRO-Offload (https://arxiv.org/abs/2101.06840),
    except that the update is computed on the GPU, whose memory is free of activations by then. The state of parameters
    on the CPU stays there.

    Args:
        inner: The optimizer; its parameter groups and state are shared with this one.

    Raises:
        ConfigurationError: If it is not known to update each parameter independently of the others.
    """

    def __init__(self, inner: Optimizer) -> None:
        if type(inner) not in UPDATE_EACH_ALONE:
            names = ", ".join(f"{kind.__module__.partition('.')[0]}'s {kind.__name__}" for kind in UPDATE_EACH_ALONE)
            raise ConfigurationError(
                f"model.offload_optimizer is not known to work with {type(inner).__name__}: leave it out, or use one "
                f"of {names}."
            )
        self.inner = inner
        self._host: dict[tuple[Parameter, str], Tensor] = {}  # host buffers for the state of parameters on a GPU
        self._copies: StateCopies | None = None
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups

    @property
    def state(self) -> Any:
        """The state of ``inner``, in host memory; waits until all of it has arrived there."""
        if self._copies is not None:
            self._copies.settle()
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        if state:  # ignores the empty dict that torch's constructor sets
            self.inner.state = state

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.inner.param_groups
        buckets = [[*_buckets([p for p in group["params"] if p.grad is not None])] for group in groups]
        device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
        if device.type == "cuda":
            self._copies = self._copies or StateCopies(device)
            sizes = (bytes_in_place([value for *_, value in self._away(each)]) for group in buckets for each in group)
            self._copies.begin(PLACES, max(sizes, default=0))
        try:
            for group, of_group in zip(groups, buckets, strict=True):
                self._step_group(group, of_group)
        finally:
            self.inner.param_groups = groups
            if self._copies is not None:
                self._copies.end()
        return loss

    def _step_group(self, group: dict[str, Any], buckets: list[list[Parameter]]) -> None:
        """Update a group bucket by bucket, each with the values that the group had before the step."""
        everything = group["params"]
        before = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        changed: dict[str, Any] = {}
        self.inner.param_groups = [group]
        coming = map(self._bring, buckets)
        places = deque(itertools.islice(coming, 1))
        try:
            for bucket in buckets:
                places.extend(itertools.islice(coming, 1))  # copied in while this bucket is updated
                place = places.popleft()
                if self._copies is not None and place is not None:
                    self._copies.await_arrival(place)
                for key in group.keys() - before.keys() - {"params"}:
                    del group[key]
                group.update(copy.deepcopy(before), params=bucket)
                self.inner.step()
                changed |= {key: group[key] for key in group if key != "params" and _differ(group[key], before, key)}
                self._take_back(bucket, place)
        finally:
            group.update(changed, params=everything)

    def put_away(self, parameter: Parameter, name: str, value: Tensor) -> None:
        """Store a part of a parameter's state, read from a checkpoint, in host memory until the next step."""
        state = self.state
        if parameter.is_cuda:
            value = self._waiting(parameter, name, value).copy_(value)
        state[parameter][name] = value

    def _waiting(self, parameter: Parameter, name: str, like: Tensor) -> Tensor:
        held = self._host.get((parameter, name))
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            held = torch.empty_like(like, device="cpu", pin_memory=True)
            self._host[parameter, name] = held
        return held

    def _away(self, bucket: list[Parameter]) -> list[tuple[Parameter, str, Tensor]]:
        """Return the part of the bucket's state that is in its host buffers."""
        return [
            (parameter, name, value)
            for parameter in bucket
            for name, value in self.inner.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value is self._host.get((parameter, name))
        ]

    def _bring(self, bucket: list[Parameter]) -> Place | None:
        """Start copying the bucket's state to the device; return its place there, or None if there is none to copy."""
        away = self._away(bucket)
        if self._copies is None or not away:
            return None
        arrived, place = self._copies.bring([value for *_, value in away])
        for (parameter, name, _), value in zip(away, arrived, strict=True):
            self.inner.state[parameter][name] = value
        return place

    def _take_back(self, bucket: list[Parameter], place: Place | None) -> None:
        if self._copies is None:
            return
        here = [
            (parameter, name, value)
            for parameter in bucket
            for name, value in self.inner.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.is_cuda
        ]
        is_new = any((parameter, name) not in self._host for parameter, name, _ in here)
        waiting = [self._waiting(*each) for each in here]
        self._copies.take_back([value for *_, value in here], waiting, place)
        for (parameter, name, _), held in zip(here, waiting, strict=True):
            self.inner.state[parameter][name] = held
        if is_new:  # new state takes memory outside the places: wait until it has left before the next is allocated
            self._copies.settle()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the inner optimizer; the next step moves it off the device."""
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


def offload_state(factory: OptimizerFactory) -> OptimizerFactory:
    """Return a factory for the same optimizers with their state in host memory."""

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
