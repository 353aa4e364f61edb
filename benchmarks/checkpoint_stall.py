"""How long a step waits for a checkpoint that is written in the background.

    python benchmarks/checkpoint_stall.py [--gpu] [--write]

With --gpu, two trainings: LoRA of rank 64 in fp32 on all linear layers in the shape of an 8B Llama (random bf16
weights, no attention), and full training of a model with a billion bf16 weights, with Adam's moments. Without --gpu, a
small version of each on the CPU.

The stall is the time that training waits in ``save_checkpoint``: the first, the median and the longest of seven. Next
to it are the median and the longest of seven bare copies of the same number of bytes to page-locked memory, since a
copy now and then takes longer on a shared machine. The last columns are the median step, and the median step while
files are being written.

With --gpu, exits with 1 if LoRA's longest stall exceeds 100 ms, or if the first or median stall of full training is
more than 10 % longer than the median bare copy.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from optimi import Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pipelite import PipeLiteStrategy
from report import Report

LORA_LIMIT, FULL_LIMIT = 0.1, 1.1
STEPS, EVERY, CHECKPOINTS = 2000, 4, 7  # at most; before the first; each after the last is complete


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, by Llama's names."""

    layers: int
    hidden: int
    key_value: int
    intermediate: int
    rank: int = 0  # 0 trains the weights themselves
    tokens: int = 2048


CASES = {
    True: {
        "LoRA rank 64, 8B shape": Shape(32, 4096, 1024, 14336, rank=64),
        "full, 1B": Shape(16, 2048, 2048, 8192),
    },
    False: {"LoRA rank 16, small": Shape(8, 256, 64, 1024, rank=16, tokens=64), "full, small": Shape(8, 256, 64, 1024)},
}


class Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int, device: torch.device) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
        self.weight = nn.Parameter(weight, requires_grad=not rank)
        if rank:
            self.a = nn.Parameter(torch.randn(rank, inputs, device=device) / inputs**0.5)
            self.b = nn.Parameter(torch.zeros(outputs, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        return y + (x.float() @ self.a.T @ self.b.T).to(y) if hasattr(self, "a") else y


class Layer(nn.Module):
    """The projections of a decoder layer."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        h, kv, i = shape.hidden, shape.key_value, shape.intermediate
        sizes = {"q": (h, h), "k": (h, kv), "v": (h, kv), "o": (h, h), "gate": (h, i), "up": (h, i), "down": (i, h)}
        self.projections = nn.ModuleDict({n: Projection(*size, shape.rank, device) for n, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        p = self.projections
        q, kv = p["q"](x), p["k"](x) + p["v"](x)
        mixed = q * kv.repeat(1, q.shape[1] // kv.shape[1])
        x = x + p["o"](mixed)
        x = nn.functional.rms_norm(x, x.shape[1:])
        return x + p["down"](nn.functional.silu(p["gate"](x)) * p["up"](x))


class Model(L.LightningModule):
    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(shape, device) for _ in range(shape.layers))

    def pipeline_layers(self) -> Any:
        return list(self.layers), lambda outputs, targets: (outputs.float() - targets).square().mean()

    def training_step(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return Adam([p for p in self.parameters() if p.requires_grad], lr=1e-5)


class Saving(L.pytorch.callbacks.Checkpoint):
    """Saves checkpoints and times the stalls and steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stalls: list[float] = []
        self.steps: list[tuple[float, bool]] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        _synchronize()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        _synchronize()
        self.steps.append((time.perf_counter() - self._began, bool([*self.folder.glob(".*partial")])))
        # A save during another's write would wait for it, which is not what is measured.
        if trainer.global_step >= EVERY and not self.steps[-1][1] and len(self.stalls) < CHECKPOINTS:
            for path in self.folder.iterdir():  # all seven could fill a disk
                shutil.rmtree(path)
            now = time.perf_counter()
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            self.stalls.append(time.perf_counter() - now)
            trainer.should_stop = len(self.stalls) == CHECKPOINTS


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare_copies(size: int, gpu: bool) -> list[float]:
    """Return the seconds of copies of ``size`` bytes to the host, one for each checkpoint."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda" if gpu else "cpu")
    target = torch.zeros(size, dtype=torch.uint8)
    if gpu:
        torch.cuda.cudart().cudaHostRegister(target.data_ptr(), size, 0)
    times = []
    for _ in range(CHECKPOINTS):
        _synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize()
        times.append(time.perf_counter() - began)
    if gpu:
        torch.cuda.cudart().cudaHostUnregister(target.data_ptr())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/checkpoint_stall.md")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        sys.exit("checkpoint_stall.py --gpu needs a GPU")
    device = torch.device("cuda:0" if arguments.gpu else "cpu")
    report, failed = (
        Report(
            "checkpoint_stall",
            "| training | GiB a checkpoint | stall: first | median | most | bare copy: median | most | step "
            "| step while written |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ),
        False,
    )
    for name, shape in CASES[arguments.gpu].items():
        with tempfile.TemporaryDirectory() as directory:
            saving = Saving(Path(directory))
            trainer = L.Trainer(
                strategy=PipeLiteStrategy(), accelerator="gpu" if arguments.gpu else "cpu", devices=1, max_steps=STEPS,
                max_epochs=-1, callbacks=[saving], logger=False, enable_progress_bar=False, enable_model_summary=False,
                num_sanity_val_steps=0, limit_val_batches=0,
            )  # fmt: skip
            inputs = torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16)
            batches: Any = [(inputs, inputs.float())] * STEPS
            trainer.fit(Model(shape, device), DataLoader(batches, batch_size=None))
            size = sum(path.stat().st_size for path in Path(directory).glob("*.ckpt/*"))
            del trainer
        torch.cuda.empty_cache()
        copies, stalls = bare_copies(size, arguments.gpu), saving.stalls
        copy, first, median, most = statistics.median(copies), stalls[0], statistics.median(stalls), max(stalls)
        busy = [seconds for seconds, writing in saving.steps[2:] if writing]
        idle = [seconds for seconds, writing in saving.steps[2:] if not writing]
        steps = statistics.median(idle), statistics.median(busy or [float("nan")])
        times = (first, median, most, copy, max(copies), *steps)
        report.row(f"| {name} | {size / 2**30:.2f} | {' | '.join(f'{1000 * t:.0f} ms' for t in times)} |")
        failed |= arguments.gpu and (most > LORA_LIMIT if shape.rank else max(first, median) > FULL_LIMIT * copy)
    if arguments.gpu:
        report.line(f"Limits 100 ms (LoRA), the bare copy and 10 % (full): {'FAILED' if failed else 'all within'}")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
