"""The loops that step.py measures, each over the same tokens."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
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
from lightning_pipelite.shared.async_scalar import AsyncScalar
from random_model import SHAPES, has_experts
from step_jobs import BARE, FLOAT32, MICRO_BATCHES, REFERENCE, TRAINER, UNSLOTH, Job, make_adapter, micro_batches
from unsloth_step import run_unsloth

LR, WARM_UP = 1e-4, 3


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
        fp8_transpose_cache=job.transpose_cache, bnb_4bit_use_double_quant=job.saving, offload_optimizer=job.saving,
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


def first_values(directory: str) -> Path:
    return Path(directory).with_name("adapter")


LOOPS: dict[str, Callable[..., Run]] = {
    TRAINER: through_trainer, BARE: bare_loop, REFERENCE: reference_loop, FLOAT32: float32_loop, UNSLOTH: unsloth_loop,
}  # fmt: skip
