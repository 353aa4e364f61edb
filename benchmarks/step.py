"""A training step through the Trainer, against a bare loop over the same layers and against transformers + PEFT.

    python benchmarks/step.py [--jobs NAME,...] [--steps 20] [--shape 8b|1b|qwen3-moe|gpt-oss|mixtral|tiny|...]
                              [--loops NAME,...] [--write]

On one GPU, random bf16 weights in the shape of a Llama or of a mixture of experts, sequences of 4096 tokens (one
document each, the most work), 4 micro-batches a step, rank 16 in float32 on all linear layers and experts. Each job
names the loops that train it, from the same values over the same tokens:

- *Trainer*: PipeLiteModule under PipeLiteStrategy, one stage.
- *bare loop*: the same stage, loss and optimizer without Lightning and DeepSpeed.
- *transformers + PEFT*: their model and forward, recomputed layers, the same optimizer (LoRA and QLoRA).
- *float32*: the same in float32, products in tf32: for mixtures, the reference for the others' losses. In bf16, PEFT
  adds B·A to the experts' weights, whose rounding removes most of a small B·A.
- *Unsloth*, where it is installed: its model and recomputation, the same optimizer, but its own random initial values.

Tokens/s are those of the median step after three of warm-up, from the end of one to the end of the next; memory is the
peak of torch's allocated memory. MFU counts the operations that the model needs, without recomputation (4
floating-point operations a token for each frozen weight outside the embedding, of the experts only those that a token
is routed to; 6 for a trained one; and causal attention), over 989 TFLOP/s, an H100's dense bf16 rate in its data sheet.

Exits with 1 if a loss of the Trainer's differs from another loop's by more than 2e-2 (for mixtures, from the bare
loop's or float32's), or if a limit is missed; the limits include the Trainer's time against the bare loop's and, where
both jobs ran, offload's against recompute's.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from optimi import Adam
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Adapter, ControlAdapter, Full, LoRA
from lightning_pipelite.shared.async_scalar import AsyncScalar
from random_model import SHAPES, has_experts, random_sequences, write_model
from report import Report
from unsloth_step import is_installed, run_unsloth

MICRO_BATCHES, RANK, LR, WARM_UP = 4, 16, 1e-4, 3
LOSS_LIMIT, PEAK_RATE = 2e-2, 989e12
OVERHEAD_LIMIT, OFFLOAD_LIMIT = 1.02, 1.03
TRAINER, BARE, REFERENCE, FLOAT32, UNSLOTH = "Trainer", "bare loop", "transformers + PEFT", "float32", "Unsloth"


@dataclass(frozen=True)
class Job:
    """What is trained, and what it must reach on an H100.

    Attributes:
        adapter: A name of :func:`make_adapter`.
        memory: The option ``activation_memory``.
        in_4bit: The option ``load_in_4bit``.
        in_fp8: The option ``load_in_fp8``.
        tokens_per_s: Lower limit.
        gib: Upper limit.
        loops: The loops that train it.
        shape: The shape that it is trained with, if not the given one.
        limited: The shape that the limits apply to.
        saving: Whether the scales of 4-bit weights are quantised too, and the optimizer's state is on the host.
    """

    adapter: str
    memory: str
    in_4bit: bool = False
    tokens_per_s: float = 0.0
    gib: float = math.inf
    loops: tuple[str, ...] = (TRAINER, BARE)
    shape: str = ""
    limited: str = "8b"
    in_fp8: bool = False
    saving: bool = False


JOBS = {
    "lora": Job("LoRA", "keep", tokens_per_s=15_000, gib=60, loops=(TRAINER, BARE, REFERENCE)),
    "lora-little": Job("LoRA", "offload", tokens_per_s=11_000, gib=17.4),
    "lora-recompute": Job("LoRA", "recompute", loops=(TRAINER,)),
    "qlora-little": Job("LoRA", "offload", in_4bit=True, tokens_per_s=9_500, gib=8.1, loops=(TRAINER, BARE, REFERENCE)),
    "control": Job("Control Adapters", "keep", tokens_per_s=16_000, gib=60),
    "full": Job("full", "keep", shape="1b"),
    "lora-fp8": Job("LoRA", "keep", tokens_per_s=19_000, gib=25.5, in_fp8=True),
    "lora-fp8-little": Job("LoRA", "offload", tokens_per_s=14_500, gib=10.5, in_fp8=True),
    "control-fp8": Job("Control Adapters", "keep", tokens_per_s=20_000, gib=28, in_fp8=True),
}
ALL_LOOPS = (TRAINER, BARE, REFERENCE, FLOAT32, UNSLOTH)
WHOLE = "qwen3-moe-48"  # only its own job fits in memory
EXPERT_JOBS = {
    "experts-recompute": Job("LoRA", "recompute", False, 40_000, 18.5, ALL_LOOPS, limited="qwen3-moe"),
    "experts-keep": Job("LoRA", "keep", False, 48_000, 40, limited="qwen3-moe"),
    "experts-qlora": Job("LoRA", "recompute", True, 32_000, 9, limited="qwen3-moe"),
    "experts-attention": Job("LoRA on attention", "recompute", False, 45_000, 16.5, limited="qwen3-moe"),
    "experts-full": Job("full", "recompute", shape="tiny-moe"),
    "experts-qlora-whole": Job("LoRA", "offload", True, 8_500, 22, (TRAINER,), limited=WHOLE, saving=True),
}


def make_adapter(name: str) -> Adapter:
    attention = LoRA(RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return {
        "LoRA": LoRA(RANK),
        "LoRA on attention": attention,
        "Control Adapters": ControlAdapter(RANK),
        "full": Full(),
    }[name]


def micro_batches(shape: str, steps: int, adapter: Adapter) -> list[dict[str, Tensor]]:
    """Return sequences of one document each; a few are repeated, so that the loss falls."""
    length = SHAPES[shape]["max_position_embeddings"]
    made = random_sequences(2 * MICRO_BATCHES, length, SHAPES[shape]["vocab_size"])
    if "control_classes" in adapter.batch_keys:
        generator = torch.Generator().manual_seed(2)
        for batch in made:
            batch["control_classes"] = torch.randint(-1, 2, (1, length), generator=generator)
    return [made[number % len(made)] for number in range(steps * MICRO_BATCHES)]


@dataclass
class Run:
    """The measurements of a loop: the loss and seconds of each step, and the peak in GiB."""

    losses: list[float]
    seconds: list[float]
    gib: float

    def tokens_per_s(self, shape: str) -> float:
        tokens = MICRO_BATCHES * SHAPES[shape]["max_position_embeddings"]
        return tokens / statistics.median(self.seconds[WARM_UP:])


class Timing(L.Callback):
    """Records the loss and the end of each step, and optionally profiles one. The strategy waits for each loss."""

    def __init__(self, steps: int, profiled: Path | None) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []
        self._steps, self._profiled = steps, profiled
        self._profiler: Any = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if len(self.losses) == trainer.global_step:
            return
        self.ends.append(time.perf_counter())
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if self._profiled and self._steps - len(self.losses) < 2:  # of the last step, which slows no other
            torch.cuda.synchronize()
            if len(self.losses) == self._steps - 1:
                self._profiler = torch.profiler.profile().__enter__()
            else:
                self._profiler.__exit__(None, None, None)
                averages = self._profiler.key_averages()
                lines = [averages.table(sort_by=key, row_limit=45, max_name_column_width=90)
                         for key in ("self_cuda_time_total", "self_cpu_time_total")]  # fmt: skip
                self._profiled.write_text("\n".join(lines))
                self._profiler.export_chrome_trace(str(self._profiled.with_suffix(".json")))


def make_module(job: Job, directory: str) -> PipeLiteModule:
    return PipeLiteModule(
        directory, make_adapter(job.adapter), load_in_4bit=job.in_4bit, load_in_fp8=job.in_fp8, lr=LR,
        schedule="constant", activation_memory=job.memory,  # type: ignore[arg-type]
        bnb_4bit_use_double_quant=job.saving, offload_optimizer=job.saving,
    )  # fmt: skip


def one_stage_trainer(callback: L.Callback, steps: int, micro_batches: int) -> L.Trainer:
    """Return a Trainer that only trains."""
    return L.Trainer(
        strategy=PipeLiteStrategy(), accelerator="auto", devices=1, accumulate_grad_batches=micro_batches,
        max_steps=steps, max_epochs=-1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip


def through_trainer(job: Job, shape: str, directory: str, steps: int, profiled: Path | None = None) -> Run:
    timing = Timing(steps, profiled)
    module = make_module(job, directory)
    trainer = one_stage_trainer(timing, steps, MICRO_BATCHES)
    trainer.fit(module, DataLoader(micro_batches(shape, steps, module.adapter), batch_size=None))  # type: ignore[arg-type]
    ends = timing.ends
    return Run(timing.losses, [0.0, *(b - a for a, b in itertools.pairwise(ends))], peak_gib())


def bare_loop(job: Job, shape: str, directory: str, steps: int) -> Run:
    module = make_module(job, directory)
    layers, loss_of = module.pipeline_layers()
    stage = layers.build_stage(0, len(layers), device())
    stage.expect_documents(1)
    if REFERENCE in job.loops:  # that loop starts from the same values
        module.adapter.save(first_values(directory), [layers.trained_state(stage)], Path(directory))

    def forward(batch: dict[str, Tensor]) -> Tensor:
        extra = [batch[key] for key in module.adapter.batch_keys]
        terms = loss_of(stage((batch["input_ids"], batch["position_ids"], *extra)), batch["labels"])
        return terms[0] if isinstance(terms, tuple) else terms

    return plain_steps(
        forward,
        stage,
        micro_batches(shape, steps, module.adapter),
        module.optimizer_factory,
        lambda: module.adapter.after_step(stage.causal_lm),
    )


def float32_loop(job: Job, shape: str, directory: str, steps: int) -> Run:
    torch.set_float32_matmul_precision("high")
    try:
        return reference_loop(job, shape, directory, steps, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


def reference_loop(job: Job, shape: str, directory: str, steps: int, dtype: torch.dtype = torch.bfloat16) -> Run:
    """Train with transformers and PEFT from the adapter's initial values, which the bare loop has written."""
    if not first_values(directory).exists():
        bare_loop(job, shape, directory, steps=0)
        free()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": device()},
        quantization_config=quantization if job.in_4bit else None,
        **({"experts_implementation": "eager"} if dtype == torch.float32 and has_experts(shape) else {}),
    )  # fmt: skip
    model: Any = PeftModel.from_pretrained(base, str(first_values(directory)), is_trainable=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    free()

    def forward(batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(logits[0].float(), batch["labels"][0], reduction="sum")

    optimizer = partial(Adam, betas=(0.9, 0.99), eps=1e-6)
    batches = micro_batches(shape, steps, make_adapter(job.adapter))
    return plain_steps(forward, model, batches, optimizer, lambda: None)


def unsloth_loop(job: Job, shape: str, directory: str, steps: int) -> Run:
    batches = micro_batches(shape, steps, make_adapter(job.adapter))
    return Run(**run_unsloth(directory, batches, attention_alone="attention" in job.adapter, in_4bit=job.in_4bit))


def first_values(directory: str) -> Path:
    return Path(directory).with_name("adapter")


def plain_steps(
    forward: Callable[[dict[str, Tensor]], Tensor], model: nn.Module, batches: list[dict[str, Tensor]],
    optimizer_of: Callable[..., Any], after_step: Callable[[], None],
) -> Run:  # fmt: skip
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], LR)
    losses, seconds = [], []
    began = time.perf_counter()
    for start in range(0, len(batches), MICRO_BATCHES):
        total = torch.zeros((), device=device())
        group = batches[start : start + MICRO_BATCHES]
        count = sum(batch["labels"].numel() for batch in group)
        for batch in group:
            loss = forward({name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}) / count
            total += loss.detach()
            read = AsyncScalar(total.clone())  # as in the strategy: the host does not wait for backward
            loss.backward()
        losses.append(float(read.value()))
        optimizer.step()
        optimizer.zero_grad()
        after_step()
        ended = time.perf_counter()
        seconds.append(ended - began)
        began = ended
    return Run(losses, seconds, peak_gib())


def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def mfu(job: Job, shape: str, tokens_per_s: float) -> float:
    config = SHAPES[shape]
    h, layers, length = (config[key] for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings"))
    i = config.get("moe_intermediate_size", config["intermediate_size"]) * config.get("num_experts_per_tok", 1)
    size = config.get("head_dim", h // config["num_attention_heads"])
    q, kv = (size * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * (2 * h * q + 2 * h * kv + 3 * h * i) + h * config["vocab_size"]
    attention = 3 * layers * 2 * length * q  # forward, and twice that backward, over half of the pairs of tokens
    return tokens_per_s * ((6 if job.adapter == "full" else 4) * weights + attention) / PEAK_RATE


LOOPS: dict[str, Callable[..., Run]] = {
    TRAINER: through_trainer, BARE: bare_loop, REFERENCE: reference_loop, FLOAT32: float32_loop, UNSLOTH: unsloth_loop,
}  # fmt: skip


def compared(speeds: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], tuple[str, str], float]]:
    """Yield two runs, each a job and a loop, and the limit of the first one's time over the second one's."""
    runs = set(speeds)
    pairs = [((job, TRAINER), (job, BARE), OVERHEAD_LIMIT) for job in JOBS | EXPERT_JOBS]
    pairs.append((("lora-little", TRAINER), ("lora-recompute", TRAINER), OFFLOAD_LIMIT))
    yield from (pair for pair in pairs if runs.issuperset(pair[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", help="default: all jobs for the shape")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--loops", help=f"a subset of {', '.join(LOOPS)}; default: all loops of each job")
    parser.add_argument("--profile", type=Path, help="write profiles of a step of the Trainer's to this folder")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/step.md, or step_SHAPE.md")
    arguments = parser.parse_args()
    chosen = arguments.loops.split(",") if arguments.loops else list(LOOPS)
    if unknown := set(chosen) - set(LOOPS):
        parser.error(f"--loops: unknown {', '.join(unknown)}; choose from {', '.join(LOOPS)}")
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    jobs = EXPERT_JOBS if has_experts(arguments.shape) else JOBS
    fitting = [name for name, job in jobs.items() if (job.limited == WHOLE) == (arguments.shape == WHOLE)]
    report = Report(
        f"step_{arguments.shape}" if has_experts(arguments.shape) else "step",
        "| job | activations | loop | tokens/s | MFU | peak GiB | loss, first to last | largest difference | limits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    failed = False
    speeds: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in arguments.jobs.split(",") if arguments.jobs else fitting:
            job = jobs[name]
            shape = job.shape if job.shape and not arguments.shape.startswith("tiny") else arguments.shape
            directory = Path(folder) / shape
            if not directory.exists():
                write_model(directory, shape, device())
            ours: Run | None = None
            for loop in job.loops:
                if loop not in chosen or (loop == UNSLOTH and not is_installed()):
                    continue
                free()
                profiled = {"profiled": arguments.profile / f"{name}.txt"} if arguments.profile else {}
                run = LOOPS[loop](job, shape, str(directory), arguments.steps, **(profiled if loop == TRAINER else {}))
                speed = speeds[name, loop] = run.tokens_per_s(shape)
                difference, limits = "", ""
                if ours is None:
                    ours = run
                    if torch.cuda.is_available() and shape == job.limited and job.tokens_per_s:
                        held = speed >= job.tokens_per_s and run.gib <= job.gib
                        failed |= not held
                        limits = f"{job.tokens_per_s:,.0f}, {job.gib:g} GiB: {'held' if held else 'FAILED'}"
                else:
                    most = max(abs(a - b) for a, b in zip(run.losses, ours.losses, strict=True))
                    if not has_experts(shape) or loop in (BARE, FLOAT32):
                        failed |= not most <= LOSS_LIMIT
                    difference = f"{most:.1e}"
                report.row(
                    f"| {name} ({shape}) | {job.memory} | {loop} | {speed:,.0f} | {100 * mfu(job, shape, speed):.1f} % "
                    f"| {run.gib:.2f} | {run.losses[0]:.4f} to {run.losses[-1]:.4f} | {difference} | {limits} |"
                )
    for one, other, limit in compared(speeds):
        ratio = speeds[other] / speeds[one]
        failed |= torch.cuda.is_available() and not ratio <= limit
        names = [f"{job}, {loop}" for job, loop in (one, other)]
        report.line(f"{names[0]}: {ratio:.3f} times as long as {names[1]} (limit {limit})")
    report.line(f"{arguments.steps} steps; {'FAILED' if failed else 'all within their limits'}")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
