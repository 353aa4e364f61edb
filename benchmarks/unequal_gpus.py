"""How well `partition_method: auto` cuts for a slow GPU with little memory next to another one, against every cut.

    python benchmarks/unequal_gpus.py [--shape 8b] [--layers 12] [--memory 8] [--micro-batches 8] [--steps 3] [--write]

Two ranks train a LoRA on real text through the Trainer, with recomputed layers. The second GPU is slowed down by
computing each of its layers twice, forward and backward, and each product twice while the speed of the GPUs is
measured; torch's allocator may take at most ``--memory`` GiB of it. A cut that the plan refuses is left out. Without
two GPUs, this only shows on a CPU that it works: speeds are given, and time and memory are not checked. unequal.py
times cuts there, with layers that sleep.

Exits with 1 if a loss differs by more than 1e-2; on GPUs, also if the best cut's step takes less than 0.93 of the time
of auto's, or if a peak is more than 5 % from the plan's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import lightning as L
import torch
from torch import Tensor, nn

import tests_support  # noqa: F401
from data_fixtures import write_tokenizer
from lightning_pipelite import PackedDataModule, PipeLiteStrategy
from lightning_pipelite.data import DatasetConfig
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.planning import memory_plan
from lightning_pipelite.planning.device_speed import measured_speed
from planned_peaks import planned_peaks
from processes import Workers
from random_model import SHAPES, write_random
from report import Report
from scaling_jobs import Setting, make_module
from sleeping import Clock

OF_BEST, OF_PLAN, LOSS_LIMIT, WARM_UP, SLOW = 0.93, 0.05, 1e-2, 2, 1
GIB = 2**30


class Twice(nn.Module):
    """A layer that is computed twice, with the same result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first, second = (self.layer(*args, **kwargs) for _ in range(2))
        half: Tensor = (first + second) / 2
        return half


class Watch(Clock):
    """Slows the layers down if ``slow``; records the end and the loss of each step, and resets the peak."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self._slow = slow

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        layers = module.pipeline_stage.causal_lm.model.layers
        for number in range(len(layers) if self._slow else 0):
            layers[number] = Twice(layers[number])

    def on_train_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


class InThisProcess(PackedDataModule):
    """Reads ahead in no other process: the ranks are daemons, which cannot start any."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        loader.num_workers = 0
        return loader


@contextlib.contextmanager
def slow_products() -> Iterator[None]:
    """Make the plan measure half the speed on this rank's GPU."""

    def measured(device: torch.device) -> float:
        once = torch.mm

        def twice(*args: Any, **kwargs: Any) -> Tensor:
            once(*args, **kwargs)
            return once(*args, **kwargs)

        with mock.patch.object(torch, "mm", twice):
            return measured_speed(device)

    with mock.patch.object(memory_plan, "measured_speed", measured):
        yield


def train(setting: Setting, method: str, memory: float, micro_batches: int) -> dict[str, Any] | None:
    """Train as one of the ranks; return step time, losses, peak in bytes and the stage, or None if it does not fit."""
    rank = int(os.environ["RANK"])
    if setting.on_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(rank).total_memory
        torch.cuda.set_per_process_memory_fraction(memory * GIB / total if rank == SLOW else 1.0, rank)
    module, watch = make_module(setting, "lora"), Watch(rank == SLOW)
    strategy = PipeLiteStrategy(2, method, speeds=None if setting.on_gpu or method != "auto" else [1.0, 0.5])
    trainer = L.Trainer(
        strategy=strategy, accelerator="gpu" if setting.on_gpu else "cpu", devices=2, logger=False,
        accumulate_grad_batches=micro_batches, max_steps=WARM_UP + setting.steps, max_epochs=-1, callbacks=[watch],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    )  # fmt: skip
    data = InThisProcess(
        [DatasetConfig(f"{setting.directory}/topics.txt")], sequence_len=setting.length, tokenizer_dir=setting.directory
    )
    try:
        with slow_products() if rank == SLOW else contextlib.nullcontext():
            trainer.fit(module, data)
    except ConfigurationError as error:
        if "memory" not in str(error):
            raise
        return None
    stage: Any = module.pipeline_stage
    steps = [end - begin for begin, end in itertools.pairwise(watch.ends[WARM_UP - 1 :])]
    peak = torch.cuda.max_memory_allocated() if setting.on_gpu else 0
    return {"seconds": statistics.median(steps), "losses": watch.losses, "peak": peak, "cut": (stage.start, stage.stop)}


def main() -> int:
    """Train with every cut, print the table, and return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.device_count() >= 2
    parser.add_argument("--shape", choices=SHAPES, default="8b" if on_gpu else "tiny")
    parser.add_argument("--layers", type=int, default=12 if on_gpu else 4)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of the slow GPU")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/unequal_gpus.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workers = Workers(2)
    report = Report(
        "unequal_gpus", "| partition_method | layers | step, s | peak GiB (planned) |", "| --- | --- | --- | --- |"
    )
    found: dict[str, dict[str, Any]] = {}
    failed = False
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        shape = SHAPES[options.shape] | {"num_hidden_layers": options.layers}
        write_random(Path(folder), {"model_type": "llama", **shape}, torch.device("cuda:0" if on_gpu else "cpu"))
        texts = [*topics.values()]
        write_tokenizer(Path(folder), texts, {"bos_token": "<s>", "eos_token": "</s>"})
        (Path(folder) / "topics.txt").write_text("\n".join(texts), encoding="utf-8")
        if on_gpu:
            torch.cuda.empty_cache()
        length = shape["max_position_embeddings"]
        setting = Setting(folder, shape["vocab_size"], length, options.steps, "recompute", None, on_gpu, False)
        cuts = [f"layers:{first},{options.layers - first}" for first in range(1, options.layers)]
        for method in ("auto", *cuts):
            runs = workers.run(2, train, setting, method, options.memory, options.micro_batches, timeout=600)
            if None in runs:
                report.row(f"| {method} | - | refused | - |")
                continue
            cut = (0, runs[0]["cut"][1], options.layers)
            found[method] = runs[0] | {"seconds": max(run["seconds"] for run in runs)}
            peaks = "-"
            if on_gpu:
                plans = planned_peaks(setting, "lora", cut, 1, [options.micro_batches])[0]
                measured = [run["peak"] / GIB for run in runs]
                peaks = " / ".join(f"{gib:.2f} ({plan:.2f})" for gib, plan in zip(measured, plans, strict=True))
                failed |= any(abs(gib / plan - 1) > OF_PLAN for gib, plan in zip(measured, plans, strict=True))
            layers = f"{cut[1]} + {cut[2] - cut[1]}"
            report.row(f"| {method} | {layers} | {found[method]['seconds']:.3f} | {peaks} |")
    workers.close()
    if "auto" not in found or len(found) < 2:
        sys.exit(f"--memory {options.memory:g}: auto, or every cut, is refused; give the slow GPU more")
    best = min((method for method in found if method != "auto"), key=lambda method: found[method]["seconds"])
    share = found[best]["seconds"] / found["auto"]["seconds"]
    losses = [run["losses"] for run in found.values()]
    differ = max(abs(a - b) for each in losses for a, b in zip(each, losses[0], strict=True))
    failed |= not differ <= LOSS_LIMIT or (on_gpu and not share >= OF_BEST)
    where = f"2 GPUs, the second half as fast and with {options.memory:g} GiB" if on_gpu else "2 CPU ranks"
    report.line(
        f"{where}; {options.layers} layers of the {options.shape} shape, m = {options.micro_batches}; the best is "
        f"{best}, auto reaches {share:.3f} of it (limit {OF_BEST}); losses within {differ:.1e}: "
        f"{'FAILED' if failed else 'passed'}"
    )
    if options.write:
        report.write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
