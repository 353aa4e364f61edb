"""Pipelines over any number of GPUs or CPU processes: speed, memory, idle time and losses against one GPU.

    python benchmarks/scaling.py [--ranks N] [--one-gpu] [--shape 8b|1b|tiny|70b] [--ways lora,qlora,fp8,full]
        [--splits 2x1,1x2] [--virtual-stages 1,2,4] [--micro-batches 4,8,16,32] [--memory-limit GIB] [--no-reference]
        [--write]

Trains a Llama of random bf16 weights through the Trainer, on sequences of 4096 tokens (the tiny shape: 128), with rank
16 on all linear layers. LoRA runs with every number of micro-batches and, in stages, with uniform and with balanced
cuts (by the measured times of the layers); the other ways (fp8 is LoRA on a base in FP8; full takes the 1B shape, if 8B
is requested) with 16 micro-batches and uniform cuts. Without --ranks it takes all GPUs, or 4 processes on a CPU;
without --splits, all ways to divide them into stages x replicas, and on a CPU or with --one-gpu also those of two
ranks. --one-gpu puts all ranks on the first GPU (NCCL from 2.30): valid for losses and memory, but not for speed.

With --virtual-stages, each pipeline runs with each of these numbers of pieces a stage (V), cut uniformly and by the
measured times.

*Efficiency* is tokens/s over the number of ranks times those of one rank alone; in brackets, that over the ideal
m/(m+(p-1)/V) of p stages with m micro-batches. *Simulated* is the value in brackets that a simulation of the schedule
predicts from the measured times of layers and transfers. *Idle* is the share of the schedule in which each stage waits,
transfers included. *Peak* is the peak of torch's allocated memory, with the plan's in brackets. *Difference* is the
largest difference in any step's loss from one rank with as many micro-batches a step.

Exits with 1 if a loss differs by more than 1e-2 (bf16 noise) or does not fall; on GPUs, also if a peak is more than 5 %
from the plan's; with the 8B shape and a GPU for each rank, also if at m = 16 no cut reaches 0.95 of the ideal, or
replicas do not reach 0.97 of linear.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import tests_support  # noqa: F401
from layer_times import LayerTimes, time_layers, time_transfer
from lightning_pipelite.strategy.partition import balanced_bounds
from lightning_pipelite.strategy.transfers import let_streams_run_beside
from planned_peaks import planned_peaks
from processes import Workers
from random_model import SHAPES, write_model
from report import Report
from scaling_jobs import WAYS, Job, Run, Setting, train
from schedule_simulation import simulate
from shared_layers import SHAPE_70B, write_shared

ALL_SHAPES = {**SHAPES, "70b": SHAPE_70B}
LOSS_LIMIT, OF_IDEAL, OF_LINEAR, OF_PLAN, AT = 1e-2, 0.95, 0.97, 0.05, 16
CUTS = ("uniform", "balanced")
HOUR = 3600.0


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    let_streams_run_beside()  # workers use their GPU before they create a strategy
    on_gpu = torch.cuda.is_available() and not options.cpu
    ranks = options.ranks or (torch.cuda.device_count() if on_gpu and not options.one_gpu else 4)
    if options.one_gpu:
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    workers = Workers(ranks, one_gpu=options.one_gpu)
    places = "one GPU" if options.one_gpu else f"{ranks} GPUs" if on_gpu else f"{os.cpu_count()} CPU cores"
    where = f"{ranks} ranks on {places}"
    name = f"scaling_{'one_gpu' if options.one_gpu else f'{ranks}_gpus' if on_gpu else 'cpu'}"
    report = Report(
        name + (f"_{options.shape}" if options.shape not in ("8b", "tiny") else ""),
        "| job | stages x replicas | cut | m | tokens/s | of each rank | efficiency (of ideal) | simulated | idle | "
        "peak GiB (planned) | loss, first to last | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    failed, lines = False, []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in options.ways:
            shape = "1b" if name == "full" and options.shape in ("8b", "70b") else options.shape
            directory = Path(folder) / shape
            if not directory.exists():
                _write(directory, shape, torch.device("cuda:0" if on_gpu else "cpu"))
            setting = Setting(
                str(directory), ALL_SHAPES[shape]["vocab_size"], ALL_SHAPES[shape]["max_position_embeddings"],
                options.steps, options.activation_memory, False if options.no_compile else None, on_gpu,
                options.one_gpu,
            )  # fmt: skip
            way = Way(name, shape, setting, workers, report, options, ranks)
            failed |= way.run()
            lines += way.lines
    workers.close()
    for line in lines:
        report.line(line)
    verdict = "FAILED" if failed else "all within their limits"
    report.line(f"{where}; the {options.shape} shape; activations: {options.activation_memory}; {verdict}")
    if options.write:
        report.write()
    sys.exit(failed)


def _write(directory: Path, shape: str, device: torch.device) -> None:
    if shape == "70b":
        write_shared(directory, SHAPE_70B, device)
    else:
        write_model(directory, shape, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parse() -> Any:
    def listed(kind: Any) -> Any:
        return lambda text: [kind(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--one-gpu", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--shape", choices=ALL_SHAPES, default="8b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--ways", type=listed(str), default=["lora", "qlora", "full"])
    parser.add_argument("--splits", type=listed(lambda text: tuple(int(n) for n in text.split("x"))), help="SxR,...")
    parser.add_argument("--virtual-stages", type=listed(int), default=[1], help="pieces a stage, one job for each")
    parser.add_argument("--cuts", type=listed(str), default=[*CUTS])
    parser.add_argument("--micro-batches", type=listed(int), default=[4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=2, help="how many are timed")
    parser.add_argument("--activation-memory", default="recompute")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--memory-limit", type=float, help="GiB a card, for torch's allocator")
    parser.add_argument("--no-reference", action="store_true", help="no job on one rank alone")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scaling_*.md")
    options = parser.parse_args()
    for name, known in (("ways", WAYS), ("cuts", CUTS)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return options


class Way:
    """All jobs of a way to train.

    Attributes:
        lines: What is reported after the table.
    """

    def __init__(
        self, way: str, shape: str, setting: Setting, workers: Workers, report: Report, options: Any, ranks: int
    ) -> None:
        self._way, self._shape, self._setting, self._workers, self._report = way, shape, setting, workers, report
        self._options, self._ranks = options, ranks
        self._layers: int = ALL_SHAPES[shape]["num_hidden_layers"]
        self._counts: tuple[int, ...] = tuple(options.micro_batches)
        self._at = AT if AT in self._counts else self._counts[-1]
        if way != "lora":
            self._counts = (self._at,)
        self._alone: dict[int, Run] = {}
        self._reached: dict[tuple[int, int], float] = {}  # share of ideal or linear, by stages and replicas
        self._profile: list[str] = []  # of the first job with two stages
        self._beside = ThreadPoolExecutor(1)  # plans while the workers train
        self.lines: list[str] = []

    def run(self) -> bool:
        """Run and report the jobs; return whether one failed."""
        workers, setting = self._workers, self._setting
        times: LayerTimes = workers.run(1, time_layers, setting, self._way, timeout=HOUR)[0]
        size = setting.length * ALL_SHAPES[self._shape]["hidden_size"]
        transfer = workers.run(2, time_transfer, setting, size, timeout=HOUR)[0] if self._ranks > 1 else 0.0
        failed = False
        for job, cut in self._jobs(times):
            failed |= self._train(job, cut, times, transfer)
        self._predict(times, transfer)
        own = setting.on_gpu and not setting.one_gpu and self._shape == "8b"
        for (stages, replicas), reached in self._reached.items():
            limit = OF_IDEAL if replicas == 1 else OF_LINEAR
            if own and (replicas == 1 or (stages == 1 and self._way == "lora")):
                held = reached >= limit
                failed |= not held
                self.lines.append(
                    f"{self._way}, {stages} x {replicas}, m = {self._at}: {reached:.3f} of the ideal, limit {limit}: "
                    f"{'held' if held else 'FAILED'}"
                )
        return failed

    def _jobs(self, times: LayerTimes) -> Iterator[tuple[Job, str]]:
        """Yield each job and the name of its cut, without those that add little to the table for their GPU time."""
        splits = self._options.splits or [*self._splits()]
        if not self._options.no_reference:
            wanted = {m * replicas for _, replicas in splits for m in self._counts} | {self._at}
            most = max(self._options.micro_batches)
            yield Job(self._way, 1, 1, tuple(sorted(m for m in wanted if m <= most))), "-"
        for stages, replicas in splits:
            pieces = [v for v in self._options.virtual_stages if stages > 1 and 1 < v <= self._layers // stages]
            for virtual_stages, cut in itertools.product(pieces, self._options.cuts):
                bounds = tuple(times.bounds(self._layers, stages, virtual_stages, self._at, cut == "balanced"))
                counts = tuple(m for m in self._options.micro_batches if replicas == 1 or m <= self._at)
                yield (
                    Job(self._way, stages, replicas, counts, (), self._options.memory_limit, virtual_stages, bounds),
                    f"{cut}, V = {virtual_stages}",
                )
            if 1 not in self._options.virtual_stages and stages > 1:
                continue
            for cut in self._options.cuts if stages > 1 and self._way == "lora" else ["uniform"]:
                weights = times.weights(self._layers) if cut == "balanced" else ()
                counts = self._counts if replicas == 1 else tuple(m for m in self._counts if m <= self._at)
                if cut == "balanced":
                    counts = (self._at,)
                yield Job(self._way, stages, replicas, counts, weights, self._options.memory_limit), cut

    def _splits(self) -> Iterator[tuple[int, int]]:
        worlds = {self._ranks}
        if not self._setting.on_gpu or self._setting.one_gpu:
            worlds |= {min(2, self._ranks)}
        for world in sorted(worlds - {1}):
            for stages in range(min(world, self._layers), 0, -1):
                if world % stages == 0 and (self._way != "qlora" or stages == world):
                    yield stages, world // stages

    def _train(self, job: Job, cut: str, times: LayerTimes, transfer: float) -> bool:
        world = job.stages * job.replicas
        cuts = job.bounds or balanced_bounds(job.weights or [1] * self._layers, job.stages)
        planned = None
        if self._setting.on_gpu:
            planned = self._beside.submit(
                planned_peaks, self._setting, self._way, cuts, job.virtual_stages, job.micro_batches
            )
        everyones = self._workers.run(world, train, job, self._setting, timeout=HOUR)
        failed = False
        for index, micro_batches in enumerate(job.micro_batches):
            of_ranks: list[Run] = [runs[index] for runs in everyones]
            first = of_ranks[0]
            tokens = micro_batches * job.replicas * self._setting.length / max(run.seconds for run in of_ranks)
            ideal = micro_batches / (micro_batches + (job.stages - 1) / job.virtual_stages)
            efficiency = ideally = simulated = difference = math.nan
            if world == 1:
                self._alone[micro_batches] = first
            elif self._alone:
                nearest = min(self._alone, key=lambda m: abs(m - micro_batches * job.replicas))
                alone = nearest * self._setting.length / self._alone[nearest].seconds
                efficiency = tokens / (world * alone)
                ideally = efficiency / ideal
                if micro_batches == self._at:
                    key = job.stages, job.replicas
                    self._reached[key] = max(ideally, self._reached.get(key, 0.0))
                if same := self._alone.get(micro_batches * job.replicas):
                    difference = max(abs(a - b) for a, b in zip(first.losses, same.losses, strict=True))
                    failed |= not difference <= LOSS_LIMIT
            if job.stages > 1:
                simulated = times.efficiency(cuts, job.stages, micro_batches, transfer) / ideal
            failed |= not (math.isfinite(first.losses[-1]) and first.losses[-1] < first.losses[0])
            a_stage = [of_ranks[stage * job.replicas : (stage + 1) * job.replicas] for stage in range(job.stages)]
            idle = " / ".join(f"{sum(run.idle for run in runs) / len(runs):.0%}" for runs in a_stage)
            peak = "-"
            if planned is not None:
                peaks, plans = [max(run.gib for run in runs) for runs in a_stage], planned.result()[index]
                peak = " / ".join(f"{each:.1f}" for each in peaks)
                peak += f" ({' / '.join(f'{each:.1f}' for each in plans)})"
                failed |= any(abs(gib / plan - 1) > OF_PLAN for gib, plan in zip(peaks, plans, strict=True))
            limit = f" (limit {job.memory_limit:g})" if job.memory_limit else ""
            self._report.row(
                f"| {self._way} ({self._shape}) | {job.stages} x {job.replicas} | {cut} | {micro_batches} | "
                f"{tokens:,.0f} | {tokens / world:,.0f} | {_number(efficiency)} ({_number(ideally)}) | "
                f"{_number(simulated)} | {idle} | {peak}{limit} | {first.losses[0]:.4f} to {first.losses[-1]:.4f} | "
                f"{'-' if math.isnan(difference) else f'{difference:.1e}'} |"
            )
            if job.stages == 2 and job.replicas == 1 and not self._profile and micro_batches == self._at:
                self._profile = [*_profile(of_ranks, micro_batches)]
        return failed

    def _predict(self, times: LayerTimes, transfer: float) -> None:
        """Report the times, and the efficiency that they predict for more stages."""
        milliseconds = ", ".join(
            f"{name} {1000 * stage.forward:.2f} + {1000 * stage.backward:.2f} ms"
            for name, stage in (("a layer", times.layer), ("before", times.first), ("after", times.last))
        )
        self.lines.append(
            f"{self._way} ({self._shape}): forward + backward of {milliseconds}; a transfer {1000 * transfer:.2f} ms."
        )
        self.lines += self._profile
        for micro_batches in (16, 64):
            predicted = []
            for stages in (2, 4, 8, 16, 32, 64):
                if stages > self._layers:
                    break
                ideal = micro_batches / (micro_batches + stages - 1)
                of_cuts = [
                    simulate(times.of_stages(balanced_bounds(weights, stages)), micro_batches, transfer, True)
                    for weights in ([1] * self._layers, times.weights(self._layers))
                ]
                shown = " and ".join(f"{step.efficiency:.2f} ({step.efficiency / ideal:.2f})" for step in of_cuts)
                predicted.append(f"{stages} stages {shown}")
            self.lines.append(
                f"Simulated efficiency (of ideal), m = {micro_batches}, uniform and balanced: {'; '.join(predicted)}."
            )


def _profile(of_stages: Sequence[Run], micro_batches: int) -> Iterator[str]:
    """Yield a line for each stage about where it spends a step."""
    for stage, run in enumerate(of_stages):
        spent = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in run.instructions.items())
        waits = ", ".join(f"{place} ({number})" for place, number in run.synchronisations.most_common(8)) or "nowhere"
        yield (
            f"Profile of stage {stage}, m = {micro_batches}, ms a step: {spent}. Messages about shapes: "
            f"{run.metadata}. Where the host waited for the GPU: {waits}."
        )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    main()
