"""What CompositeWeightDecay costs a step with the LoRA of a Llama 8B, against forming every B·A.

    python benchmarks/weight_decay.py [--gpu] [--write]

The shapes of all linear layers of 32 layers (4096 wide, 14 336 in the MLP, 8 key-value heads), rank 16, float32, random
values; on a CPU only 4 layers, as the direct way would take minutes there. Time is the wall time of a step from one
idle device to the next, the median of several; "on the host" is the part in which the host is busy. Memory is the peak
allocated beyond the adapters (on a CPU, of the tensors alive at once). The direct way computes for each module W = B·A,
its norm, both updates, then W and its norm again, as qlora-pipe-lite does. Both start from the same values.

Exits with 1 if the two end with a relative difference of more than 1e-6; with --gpu, also if a step takes 3 ms or 64
MiB or more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_pipelite.callbacks.composite_weight_decay import CompositeWeightDecay
from lightning_pipelite.callbacks.support.low_rank import find_low_rank
from report import Report

HIDDEN, INNER, KEY_VALUE, RANK = 4096, 14336, 1024, 16
SHAPES = {
    "q": (HIDDEN, HIDDEN), "k": (HIDDEN, KEY_VALUE), "v": (HIDDEN, KEY_VALUE), "o": (HIDDEN, HIDDEN),
    "gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN),
}  # fmt: skip
LR, DECAY = 2e-5, 10.0
TIME_LIMIT, MEMORY_LIMIT, DIFFERENCE_LIMIT = 3.0, 64.0, 1e-6  # ms and MiB on a GPU


def make_model(device: torch.device) -> nn.Module:
    """Return PEFT's LoRA layers around linear layers whose own weights stay on the meta device."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK)
    layers = nn.ModuleDict()
    for number in range(32 if device.type == "cuda" else 4):
        for name, (inner, outer) in SHAPES.items():
            with torch.device("meta"):
                layer = Linear(nn.Linear(inner, outer), "default", config=config, r=RANK, lora_alpha=RANK)
            for part, shape in (("lora_A", (RANK, inner)), ("lora_B", (outer, RANK))):
                values = torch.randn(shape, device=device) * shape[1] ** -0.5
                getattr(layer, part)["default"].weight = nn.Parameter(values)
            layers[f"{number}_{name}"] = layer
    return layers


def composite_step(model: nn.Module) -> Callable[[bool], None]:
    """Return the callback's work after an optimizer step over all adapters; its argument says whether the step logs."""
    callback = CompositeWeightDecay(DECAY)
    callback._pairs = find_low_rank(model)
    trained = [p for pair in callback._pairs for p in (pair.a, pair.b)]
    optimizer = torch.optim.SGD(trained, lr=LR)
    return lambda logs: callback._after_step(optimizer, logs)


@torch.no_grad()
def direct_step(model: nn.Module) -> list[float]:
    """Form W for each module wherever the formulas need it; return by how much each norm falls."""
    falls = []
    for pair in find_low_rank(model):
        w = pair.b @ pair.a
        before = w.norm().item()
        to_a, to_b = pair.b.T @ w, w @ pair.a.T
        pair.a.sub_(LR * DECAY * to_a)
        pair.b.sub_(LR * DECAY * to_b)
        falls.append(before - (pair.b @ pair.a).norm().item())
    return falls


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a call, and of its part on the host."""
    whole, host = [], []
    for _ in range(repeats):
        settle(device)
        start = time.perf_counter()
        function()
        host.append(1e3 * (time.perf_counter() - start))
        settle(device)
        whole.append(1e3 * (time.perf_counter() - start))
    return statistics.median(whole), statistics.median(host)


def peak(function: Callable[[], object], device: torch.device) -> float:
    """Return the MiB that a call allocates at its peak."""
    if device.type == "cuda":
        settle(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        settle(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with Watch() as watch:
        function()
    return watch.peak / 2**20


class Watch(TorchDispatchMode):
    """Counts torch operations, including views, and the bytes of live storages that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.peak = self._alive = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _has_memory(tensor)}
        for tensor in tree_leaves(result):
            if _has_memory(tensor) and (storage := tensor.untyped_storage()).data_ptr() not in given:
                given.add(storage.data_ptr())
                self._alive += storage.nbytes()
                self.peak = max(self.peak, self._alive)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self._alive -= size


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def launches(function: Callable[[], object]) -> int:
    """Return how many kernels a call launches on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """Return the largest relative difference, in the 2-norm, of any A or B."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs if not a.is_meta)


def copy_of(model: nn.Module, device: torch.device) -> nn.Module:
    made = make_model(device)
    with torch.no_grad():
        for target, source in zip(made.parameters(), model.parameters(), strict=True):
            if not source.is_meta:
                target.copy_(source)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="on the first GPU, with the limits of 3 ms and 64 MiB")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/weight_decay.md")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        sys.exit("weight_decay.py --gpu needs a GPU")
    device = torch.device("cuda:0" if arguments.gpu else "cpu")
    model = make_model(device)
    start: list[Tensor] = [p.detach().clone() for p in model.parameters() if not p.is_meta]
    size = sum(t.nbytes for t in start) / 2**20
    name = "weight_decay_gpu" if arguments.gpu else "weight_decay"
    report = Report(name, "| a step | ms | of it on the host | MiB beyond the adapters |", "| --- | --- | --- | --- |")
    step = composite_step(model)
    for logs in (False, True):
        step(logs)  # warm-up: views and library workspaces are created once
        whole, host = timed(lambda logs=logs: step(logs), device, 20 if arguments.gpu else 3)  # type: ignore[misc]
        extra = peak(lambda logs=logs: step(logs), device)  # type: ignore[misc]
        if not logs:
            time_taken, memory_taken = whole, extra
        label = "this, and by how much the norms fall" if logs else "CompositeWeightDecay"
        report.row(f"| {label} | {whole:.2f} | {host:.2f} | {extra:.1f} |")
    modules = len(list(model.children()))
    with Watch() as watch:
        step(False)
    kernels = f", {watch.operations} operations of torch a step"
    if arguments.gpu:
        kernels += f", {launches(lambda: step(False))} kernels"
    direct = copy_of(model, device)
    step(False)
    began = time.perf_counter()
    extra = peak(lambda: direct_step(direct), device)
    whole = host = 1e3 * (time.perf_counter() - began)  # on a CPU it is too slow to repeat
    difference = largest_difference(model, direct)
    if arguments.gpu:
        whole, host = timed(lambda: direct_step(direct), device, 3)
    report.row(f"| forming every B·A, with norms | {whole:.2f} | {host:.2f} | {extra:.1f} |")
    fits = difference <= DIFFERENCE_LIMIT
    limits = f"difference {DIFFERENCE_LIMIT:.0e}"
    if arguments.gpu:
        fits &= time_taken < TIME_LIMIT and memory_taken < MEMORY_LIMIT
        limits += f", {TIME_LIMIT} ms, {MEMORY_LIMIT} MiB"
    report.line(
        f"{modules} modules, {size:.0f} MiB of A and B{kernels}; largest difference {difference:.1e}; "
        f"limits ({limits}): {'all within' if fits else 'FAILED'}"
    )
    if arguments.write:
        report.write()
    sys.exit(not fits)


if __name__ == "__main__":
    main()
