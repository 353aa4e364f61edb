"""The trainings of benchmarks/scaling.py, run by each of their ranks."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import tests_support  # noqa: F401
from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.strategy.partition import method_of
from lightning_pipelite.strategy.stage_timer import busy_and_waiting
from random_model import random_sequences
from shared_layers import read_shared

WAYS = ("lora", "qlora", "fp8", "full")  # fp8: LoRA on a base in FP8
WARM_UP, SEQUENCES, RANK = 2, 16, 16


@dataclass(frozen=True)
class Setting:
    """What all jobs have in common.

    Attributes:
        directory: Directory of the model.
        vocabulary: Size of its vocabulary.
        length: Tokens in a sequence.
        steps: Number of timed steps.
        activation_memory: Option of the module.
        compiled: Whether layers are compiled; None for the module's choice.
        on_gpu: Whether to train on GPUs.
        one_gpu: Whether the ranks share the first one.
    """

    directory: str
    vocabulary: int
    length: int
    steps: int
    activation_memory: Any
    compiled: bool | None
    on_gpu: bool
    one_gpu: bool


@dataclass(frozen=True)
class Job:
    """A way to train (one of ``WAYS``), spread over stages and replicas.

    Attributes:
        weights: Weights of the layers, by which stages are cut; if empty, all weigh the same.
        micro_batches: Numbers of micro-batches a step and replica, with a training for each.
        memory_limit: GiB of a card that torch may take.
        virtual_stages: Pieces of each stage.
        bounds: Bounds of the pieces, if a stage has several.
    """

    way: str
    stages: int
    replicas: int
    micro_batches: tuple[int, ...]
    weights: tuple[int, ...] = ()
    memory_limit: float | None = None
    virtual_stages: int = 1
    bounds: tuple[int, ...] = ()


@dataclass
class Run:
    """What one rank measured in a training.

    Attributes:
        losses: Losses of all steps.
        seconds: Time of the median step.
        gib: Peak of torch's allocated memory.
        instructions: Seconds of one step by DeepSpeed's instruction names. That step is not among the timed ones, as
            the host waits for each instruction.
        metadata: Number of messages about shapes in the last step.
        synchronisations: Where the host waited for the GPU in the last step, and how often.
    """

    losses: list[float]
    seconds: float
    gib: float
    instructions: dict[str, float]
    metadata: int
    synchronisations: Counter[str]

    @property
    def idle(self) -> float:
        """The share of a step's schedule in which this rank waits."""
        busy, waiting = busy_and_waiting(self.instructions)
        return waiting / (busy + waiting)


class Weighted(PipeLiteModule):
    """A module that is cut by measured weights of its layers instead of numbers of parameters."""

    weights: tuple[int, ...] = ()

    def pipeline_layers(self) -> Any:
        layers, loss = super().pipeline_layers()
        if self.weights:
            layers.parameter_counts = lambda: list(self.weights)  # type: ignore[method-assign]
        return layers, loss


def make_module(setting: Setting, way: str) -> Weighted:
    read_shared(Path(setting.directory))
    return Weighted(
        setting.directory, Full() if way == "full" else LoRA(RANK), load_in_4bit=way == "qlora",
        load_in_fp8=way == "fp8", lr=1e-4 if way == "full" else 1e-3,
        schedule="constant", activation_memory=setting.activation_memory, compile_layers=setting.compiled,
    )  # fmt: skip


class Measure(L.Callback):
    """Starts every training from the same values, records losses and times, and profiles the last two steps."""

    def __init__(self, start: dict[str, Tensor], steps: int) -> None:
        self._start, self._last = start, steps - 1
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.instructions: dict[str, float] = {}
        self.synchronisations: Counter[str] = Counter()
        self.metadata = 0
        self._caught: Any = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        for name, parameter in module.pipeline_stage.named_parameters():
            if parameter.requires_grad:
                if name not in self._start:
                    self._start[name] = parameter.detach().cpu().clone()
                parameter.data.copy_(self._start[name])

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # excludes loading

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        trainer.strategy.measure_stage_times = trainer.global_step == self._last - 1
        if trainer.global_step == self._last and batch_idx % trainer.accumulate_grad_batches == 0:
            engine = trainer.strategy._run.engine
            for name in ("_send_tensor_meta", "_recv_tensor_meta"):
                setattr(engine, name, self._counted(getattr(engine, name)))
            self._caught = warnings.catch_warnings(record=True)
            self._warned = self._caught.__enter__()
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if len(self.losses) == trainer.global_step:
            return
        if self._caught is not None:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.synchronisations = Counter(
                f"{'/'.join(Path(warned.filename).parts[-2:])}:{warned.lineno}"
                for warned in self._warned
                if "synchronizing" in str(warned.message)
            )
        self.ends.append(time.perf_counter())
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if trainer.strategy.measure_stage_times:
            self.instructions = trainer.strategy.instruction_times

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.metadata += 1
            return function(*args)

        return counted


def train(job: Job, setting: Setting) -> list[Run]:
    """Run a job as one of its ranks: a training for each number of micro-batches, with the same model."""
    processes = job.stages * job.replicas
    gc.collect()
    if setting.on_gpu:
        device = 0 if setting.one_gpu else int(os.environ["LOCAL_RANK"])
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if job.memory_limit is None else min(1.0, job.memory_limit * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
    module = make_module(setting, job.way)
    module.weights = job.weights
    start: dict[str, Tensor] = {}
    # Every step trains on the same sequences, so that the loss falls.
    data = random_sequences(SEQUENCES, setting.length, setting.vocabulary)
    runs, steps = [], WARM_UP + setting.steps + 2
    for micro_batches in job.micro_batches:
        method = "parameters" if job.weights else method_of(job.bounds) if job.bounds else "uniform"
        strategy = PipeLiteStrategy(job.stages, partition_method=method, virtual_stages=job.virtual_stages)
        measure = Measure(start, steps)
        trainer = L.Trainer(
            strategy=strategy, accelerator="gpu" if setting.on_gpu else "cpu",
            devices=1 if setting.one_gpu else processes, num_nodes=processes if setting.one_gpu else 1,
            accumulate_grad_batches=micro_batches, max_steps=steps, max_epochs=-1, callbacks=[measure], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, gradient_clip_val=1.0,
        )  # fmt: skip
        replica_of = strategy.topology.replica_of(int(os.environ["RANK"]))
        mine = [data[(number * job.replicas + replica_of) % SEQUENCES] for number in range(micro_batches)] * steps
        trainer.fit(module, DataLoader(mine, batch_size=None))  # type: ignore[arg-type]
        ends = measure.ends[WARM_UP - 1 : WARM_UP + setting.steps]
        runs.append(
            Run(
                measure.losses,
                statistics.median(b - a for a, b in itertools.pairwise(ends)),
                torch.cuda.max_memory_allocated(device) / 2**30 if setting.on_gpu else float("nan"),
                measure.instructions,
                measure.metadata,
                measure.synchronisations,
            )
        )
    return runs
