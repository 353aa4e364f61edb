"""How well `partition_method` balances stages: auto against uniform and type:, on CPU processes over gloo.

    python benchmarks/partition.py [--steps 7] [--write]

A Llama of eight layers with random weights and a vocabulary of 32 768, whose head costs more than two layers, is fully
fine-tuned in float32 on real text (pydoc's topics), in 2 and 4 stages.

First with one micro-batch a step: only one stage computes at a time, so two cores are enough to time each. *Slowest* is
the median, over the steps after three of warm-up, of the forward and backward time of the slowest stage, which sets the
pace of a full pipeline; *share* is its share of the time of all stages, and *plan's* the share that the plan predicted
for this cut. Then, where each stage has a core, with enough micro-batches a step to fill the pipeline: *step* is the
median time of a whole step's schedule.

Exits with 1 if auto's slowest stage or its step takes longer than another method's, or if a share exceeds 1.1 times the
plan's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tests_support  # noqa: F401

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Full
from lightning_pipelite.data import DatasetConfig
from lightning_pipelite.models import Stage
from lightning_pipelite.shared.over_ranks import gathered
from lightning_pipelite.strategy.stage_timer import busy_and_waiting
from processes import Workers
from report import Report

METHODS = ("uniform", "type:decoder", "auto")
WARM_UP, LIMIT = 3, 1.1
FULL = 4  # micro-batches a step


def write_job(folder: Path) -> None:
    """Write the model with its tokenizer, and the text."""
    (folder / "topics.txt").write_text("\n".join(topics.values()), encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        topics.values(), trainers.BpeTrainer(vocab_size=2048, special_tokens=["<s>", "</s>"], show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


class Times(L.Callback):
    """Records for each step the seconds that this rank's stage computes, and those including its waiting."""

    def __init__(self) -> None:
        self.busy: list[float] = []
        self.whole: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, PipeLiteStrategy)
        if trainer.global_step > len(self.busy):
            assert strategy.instruction_times is not None
            busy, waiting = busy_and_waiting(strategy.instruction_times)
            self.busy.append(busy)
            self.whole.append(busy + waiting)


@dataclass(frozen=True)
class Balance:
    """The cut of a method, and its times.

    Attributes:
        items: Number of layers of each stage.
        seconds: Time that each stage computes, the median of the steps.
        step: Seconds of a step, the median of the steps.
        planned: Time that the plan predicts for each stage, if there is a plan. Only the ratios count, since it
            predicts another machine.
    """

    items: list[int]
    seconds: list[float]
    step: float
    planned: list[float]


def train(folder: str, stages: int, method: str, steps: int, micro_batches: int) -> Balance:
    """Train as one of the ranks."""
    torch.set_num_threads(1)
    strategy = PipeLiteStrategy(stages, partition_method=method)
    strategy.measure_stage_times = True
    times = Times()
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=stages, max_steps=steps, max_epochs=-1, logger=False,
        callbacks=[times], accumulate_grad_batches=micro_batches,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    )  # fmt: skip
    data = PackedDataModule([DatasetConfig(f"{folder}/topics.txt")], sequence_len=256, tokenizer_dir=f"{folder}/model")
    module = PipeLiteModule(f"{folder}/model", Full(), dtype="float32", activation_memory="keep")
    trainer.fit(module, data)
    stage = module.pipeline_stage
    assert isinstance(stage, Stage)  # one piece a rank
    told = gathered((stage.start, stage.stop, statistics.median(times.busy[WARM_UP:])))
    step = max(gathered(statistics.median(times.whole[WARM_UP:])))
    costs = module.pipeline_layers()[0].layer_costs()
    planned = [sum(costs.seconds[start:stop]) for start, stop, _ in told] if costs is not None else []
    return Balance([stop - start for start, stop, _ in told], [seconds for *_, seconds in told], step, planned)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/partition.md")
    options = parser.parse_args()
    report = Report(
        "partition",
        "| stages | partition_method | layers of each | ms of each | slowest, ms | share | plan's | step, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    workers, failed = Workers(4), False
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder))
        for stages in (2, 4):
            slowest: dict[str, float] = {}
            step: dict[str, float] = {}
            for method in METHODS:
                balance: Balance = workers.run(stages, train, folder, stages, method, options.steps, 1, timeout=600)[0]
                slowest[method] = max(balance.seconds)
                share, planned = slowest[method] / sum(balance.seconds), ""
                if balance.planned:
                    bound = max(balance.planned) / sum(balance.planned)
                    failed |= share > LIMIT * bound
                    planned = f"{bound:.2f} (at most {LIMIT} times)"
                if stages <= (os.cpu_count() or 1):
                    full: Balance = workers.run(
                        stages, train, folder, stages, method, options.steps, FULL, timeout=600
                    )[0]
                    step[method] = full.step
                whole = f"{1000 * step[method]:.0f}" if method in step else "-"
                report.row(
                    f"| {stages} | {method} | {' / '.join(map(str, balance.items))} "
                    f"| {' / '.join(f'{1000 * seconds:.0f}' for seconds in balance.seconds)} "
                    f"| {1000 * slowest[method]:.0f} | {share:.2f} | {planned} | {whole} |"
                )
            failed |= any(taken["auto"] > min(taken.values()) for taken in (slowest, step) if taken)
    workers.close()
    report.line(f"{options.steps} steps; {'FAILED' if failed else 'auto is the fastest, and as planned'}")
    if options.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
