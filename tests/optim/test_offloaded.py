"""An optimizer that steps a few parameters at a time equals the same one that steps all at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import optimi
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.module.optimization import Optimization
from lightning_pipelite.optim import OffloadedOptimizer
from lightning_pipelite.optim.offloaded import UPDATE_EACH_ALONE, class_of

BETAS = (0.9, 0.99)
SHAPES = [(3, 4), (5,), (2, 3, 4), (7, 2), (1,), (4, 4)]
PLAIN = {"triton": False}  # by default, optimi's StableAdamW takes CPU parameters for GPU ones
KINDS: dict[str, Callable[..., Optimizer]] = {
    f"{kind.__module__}.{kind.__name__}": partial(kind, **PLAIN) if kind is optimi.StableAdamW else kind
    for kind in UPDATE_EACH_ALONE
} | {
    "fully decoupled": partial(optimi.AdamW, decouple_lr=True, weight_decay=1e-4),
    "together": partial(optimi.Adam, foreach=True),
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9),
}


def small_buckets(monkeypatch: pytest.MonkeyPatch, size: int = 60) -> None:
    monkeypatch.setattr("lightning_pipelite.optim.offloaded.BUCKET", size)


def parameters_in_groups(dtypes: list[torch.dtype], device: str = "cpu") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    both = [nn.Parameter(each.to(device, dtypes[n % len(dtypes)])) for n, each in enumerate(made)]
    return [{"params": both[:4]}, {"params": both[4:], "lr": 3e-3}]


def train(optimizer: Optimizer, steps: int, first: int = 0) -> None:
    """Train with a different learning rate in each step, and in one step with a parameter that has no gradient."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(first, first + steps):
        for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            generator = torch.Generator().manual_seed(100 * step + number)
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.grad = None if (step, number) == (1, 2) else gradient
        optimizer.step()
        schedule.step()


def same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each, others in zip(one, other, strict=True):
            same(each, others)
    else:
        assert one == other


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float32]], ids=["float32", "mixed"])
def test_the_same_to_the_bit(name: str, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    small_buckets(monkeypatch)
    plain = KINDS[name](parameters_in_groups(dtypes), lr=1e-2)
    apart = OffloadedOptimizer(KINDS[name](parameters_in_groups(dtypes), lr=1e-2))
    for optimizer in (plain, apart):
        train(optimizer, 4)
    same([group["params"] for group in plain.param_groups], [group["params"] for group in apart.param_groups])
    same(plain.state_dict(), apart.state_dict())
    assert apart.inner.param_groups is apart.param_groups


def test_a_group_without_parameters_is_left_alone() -> None:
    """Also on the CPU, where optimi would use Triton for such a group."""
    optimizer = OffloadedOptimizer(optimi.Adam([{"params": [nn.Parameter(torch.ones(2))]}, {"params": []}], lr=1e-2))
    before = dict(optimizer.param_groups[1])
    train(optimizer, 2)
    assert {**optimizer.param_groups[1], "lr": 1e-2} == {**before, "initial_lr": 1e-2}


def test_hooks_and_closures_come_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    small_buckets(monkeypatch)
    groups = parameters_in_groups([torch.float32])
    optimizer = OffloadedOptimizer(torch.optim.AdamW(groups, lr=1e-2))
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for parameter in groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)

    def closure() -> float:
        called.append("closure")
        return 5.0

    assert optimizer.step(closure) == 5.0
    assert called == ["before", "closure", "after"]


def test_a_failed_step_leaves_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    small_buckets(monkeypatch)
    optimizer = OffloadedOptimizer(torch.optim.AdamW(parameters_in_groups([torch.float32]), lr=1e-2))
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    optimizer.param_groups[0]["params"][1].grad = torch.ones(5).to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    assert optimizer.inner.param_groups is optimizer.param_groups


def test_state_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    small_buckets(monkeypatch)
    plain = torch.optim.AdamW(parameters_in_groups([torch.float32]), lr=1e-2)
    train(plain, 2)
    groups = copy.deepcopy([{"params": group["params"]} for group in plain.param_groups])
    apart = OffloadedOptimizer(torch.optim.AdamW(groups, lr=1e-2))
    apart.load_state_dict(copy.deepcopy(plain.state_dict()))
    for optimizer in (plain, apart):
        train(optimizer, 2, first=2)
    same(plain.state_dict()["state"], apart.state_dict()["state"])
    same([group["params"] for group in plain.param_groups], [group["params"] for group in apart.param_groups])


class Sums(torch.optim.SGD):
    """Stands for an optimizer whose update combines the gradients of all parameters."""


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, optimi.Ranger, Sums])
def test_what_is_not_known_is_refused(kind: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=f"model.offload_optimizer is not known to work with {kind.__name__}: "
    ):
        OffloadedOptimizer(kind([nn.Parameter(torch.zeros(1))], lr=1e-2))
    with pytest.raises(ConfigurationError, match=r"use one of torch's Adam, .*optimi's Adam"):
        Optimization(lambda groups, lr: kind(groups[0]["params"], lr=lr), 1e-2, BETAS, 1e-6, "constant", 0, {}, True)


def test_as_an_option() -> None:
    optimization = Optimization(None, 1e-2, BETAS, 1e-6, "rms_ratio", 0, {"b": {"lr": 1e-3}}, offload=True)
    named = [("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(2)))]
    optimizer, schedule = optimization.make(named, 1e-2, lambda: 10)
    assert isinstance(optimizer, OffloadedOptimizer)
    assert class_of(optimizer) is optimi.Adam
    assert class_of(optimizer.inner) is optimi.Adam
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert schedule["scheduler"].optimizer is optimizer


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float32]], ids=["float32", "mixed"])
def test_on_a_gpu(name: str, dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the same, and after each step all state is on the host, pinned unless it is a single number."""
    small_buckets(monkeypatch)
    plain = KINDS[name](parameters_in_groups(dtypes, "cuda"), lr=1e-2)
    apart = OffloadedOptimizer(KINDS[name](parameters_in_groups(dtypes, "cuda"), lr=1e-2))
    for step in range(4):
        for optimizer in (plain, apart):
            train(optimizer, 1, first=step)
        kept = [value for state in apart.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        assert not [value for value in kept if value.is_cuda]
        assert all(value.is_pinned() for value in kept if value.numel() > 1)
    same([group["params"] for group in plain.param_groups], [group["params"] for group in apart.param_groups])
    for one, other in zip(plain.state.values(), apart.state.values(), strict=True):
        for key, value in one.items():
            same(value.cpu() if isinstance(value, torch.Tensor) else value, other[key])


@pytest.mark.gpu
def test_the_memory_of_a_step() -> None:
    """With 64 parameters of 16 MiB, four to a bucket, at most three buckets' state is on the GPU at once."""
    parameters = [nn.Parameter(torch.ones(4 * 2**20, device="cuda")) for _ in range(64)]
    optimizer = OffloadedOptimizer(optimi.Adam(parameters, lr=1e-3))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        assert torch.cuda.max_memory_allocated() - before <= 3 * 2 * 64 * 2**20
    assert torch.cuda.memory_allocated() == before
