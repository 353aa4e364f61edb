"""How large a LoRA grows in 200 steps with and without composite weight decay, in the quickstart's model.

    python benchmarks/settling.py [DIRECTORY] [--steps 200] [--write]

DIRECTORY is what `make quickstart` has made: its base model is trained as in configs/quickstart.yaml, but with two
micro-batches a step, with weight_decay 0 and 10. The table has the mean of ‖B·A‖ over all modules, and the evaluation
loss; `--write` saves it and draws docs/weight_decay.svg.

Exits with 1 unless, in the last quarter, the mean norm grows by more than 5 % without decay and changes by less than 5
% with it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

import tests_support  # noqa: F401
from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.callbacks import AdapterNorms, CompositeWeightDecay
from lightning_pipelite.data import DatasetConfig
from processes import Workers
from report import Report

DECAYS = (0.0, 10.0)
PICTURE = Path(__file__).parent.parent / "docs" / "weight_decay.svg"


class Norms(L.Callback):
    """Records the mean norm after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if len(self.seen) < trainer.global_step:
            self.seen.append(float(trainer.callback_metrics["train/norms_avg"]))


def train(directory: str, weight_decay: float, steps: int) -> tuple[list[float], float]:
    """Train; return the mean norm after each step, and the evaluation loss after the last."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    os.chdir(directory)
    L.seed_everything(0)
    norms = Norms()
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(1), accelerator="auto", devices=1, max_steps=steps, max_epochs=-1,
        accumulate_grad_batches=2, gradient_clip_val=1.0, log_every_n_steps=1, logger=False, limit_val_batches=0,
        callbacks=[CompositeWeightDecay(weight_decay), AdapterNorms(), norms],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = PipeLiteModule("base", LoRA(rank=16), lr=2e-3, dtype="float32", activation_memory="keep")
    data = PackedDataModule(
        [DatasetConfig("texts/reference/*.txt")], sequence_len=512, tokenizer_dir="base", eval_fraction=0.1,
        cache_dir="cache",
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 1.0
    return norms.seen, float(trainer.validate(module, datamodule=data, verbose=False)[0]["eval/loss"])


def draw(curves: dict[float, list[float]]) -> None:
    """Draw the norms over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "weight_decay"  # the same file from the same numbers
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for decay, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, label=f"weight_decay {decay:g}")
    axes.set(xlabel="optimizer step", ylabel="mean ‖B·A‖ of the modules", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default="quickstart", help="made by `make quickstart`")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/settling.md and the picture")
    arguments = parser.parse_args()
    if not (arguments.directory / "base" / "config.json").is_file():
        sys.exit(f"settling.py: {arguments.directory} has no base model; run `make quickstart`, or name its directory")
    quarters = [arguments.steps * k // 4 for k in (1, 2, 3, 4)]
    steps = " | ".join(f"step {step}" for step in quarters)
    report = Report("settling", f"| weight_decay | {steps} | eval/loss |", f"|{' --- |' * 6}")
    curves: dict[float, list[float]] = {}
    workers = Workers(1)
    for decay in DECAYS:
        directory = str(arguments.directory.resolve())
        curve, loss = workers.run(1, train, directory, decay, arguments.steps, timeout=3600)[0]
        curves[decay] = curve
        report.row(f"| {decay:g} | {' | '.join(f'{curve[step - 1]:.3f}' for step in quarters)} | {loss:.4f} |")
    workers.close()
    growth = {decay: curve[-1] / curve[quarters[2] - 1] - 1 for decay, curve in curves.items()}
    settled = growth[0.0] > 0.05 and abs(growth[10.0]) < 0.05
    told = ", ".join(f"{100 * value:+.1f} % with {decay:g}" for decay, value in growth.items())
    report.line(f"Mean norm over the last quarter: {told}: {'passed' if settled else 'FAILED'}")
    if arguments.write:
        report.write()
        draw(curves)
    sys.exit(not settled)


if __name__ == "__main__":
    main()
