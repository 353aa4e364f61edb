"""Training that is interrupted and resumed with other numbers of stages and replicas, against uninterrupted training.

    python benchmarks/resume.py [--steps 24] [--write]

Float32 on CPUs over gloo, with clipped gradients: LoRA with dropout, full fine-tuning with tied embedding and head, and
Control Adapters with dropout. The training is interrupted in the middle of an epoch and between two evaluations, and
resumes with the next number of stages, replicas or virtual stages, up to the last and back to the first. The number of
micro-batches a step of each replica changes with the number of replicas. The table has the largest difference in the
loss of any step, of any evaluation, and in any final weight (relative, in the 2-norm, the worst tensor).

Exits with 1 if a loss differs by more than 1e-6, or at all where nothing has changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import tests_support  # noqa: F401
from exact_training import CLIP, LR, MICRO_BATCHES, Case, Scale, Split, make_model, sequences
from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Adapter, ControlAdapter, Full, LoRA
from processes import Workers
from report import Report
from resumable import Deal, batched

LIMIT = 1e-6
SCALE = Scale(sequences=20)
CHANGES = (
    (Split(1), Split(1)), (Split(2), Split(2)), (Split(2, 2), Split(2, 2)),
    (Split(1), Split(2)), (Split(2), Split(1)), (Split(2), Split(4)), (Split(4), Split(1)),
    (Split(1, 1), Split(1, 2)), (Split(1, 2), Split(1, 1)), (Split(1, 2), Split(2, 1)),
    (Split(2, virtual_stages=2), Split(2, virtual_stages=2)), (Split(1), Split(2, virtual_stages=2)),
    (Split(4), Split(2, 2, virtual_stages=2)),
    (Split(2), Split(2, virtual_stages=2), Split(2, virtual_stages=4)),
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What is trained."""

    name: str
    adapter: Adapter
    tied: bool = False


TRAININGS = (
    Training("LoRA, dropout 0.1", LoRA(rank=4, dropout=0.1)),
    Training("full, tied", Full(), tied=True),
    Training("Control Adapters, dropout 0.1", ControlAdapter(rank=4, dropout=0.1)),
)


@dataclass
class Course:
    """The losses of a training, by step, and its final weights."""

    losses: dict[int, float]
    evaluations: dict[int, float]
    weights: dict[str, Tensor]


class Note(L.Callback):
    def __init__(self) -> None:
        self.course = Course({}, {}, {})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.course.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.course.evaluations[trainer.global_step] = float(trainer.callback_metrics["eval/loss"])


def train(
    training: Training, split: Split, model_dir: str, steps: int, ckpt_path: str | None, save_to: str | None
) -> Course | None:
    """Train up to a step as one of the ranks; rank 0 returns the course."""
    strategy, note = PipeLiteStrategy(split.stages, virtual_stages=split.virtual_stages), Note()
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=split.stages * split.replicas, max_steps=steps, max_epochs=-1,
        accumulate_grad_batches=MICRO_BATCHES // split.replicas, gradient_clip_val=CLIP, callbacks=[note],
        val_check_interval=2 * MICRO_BATCHES // split.replicas, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(0)
    module = PipeLiteModule(model_dir, training.adapter, lr=LR, dtype="float32")
    items = batched(sequences(SCALE))
    for item in items:
        item["control_classes"] = torch.where(item["labels"] == -100, 0, item["labels"] % 3 - 1)
    training_data, held_out = (Deal(items, **strategy.distributed_sampler_kwargs) for _ in range(2))

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if save_to and trainer.global_step == steps and not trainer.fit_loop._should_accumulate():
                trainer.save_checkpoint(save_to)

    trainer.callbacks.append(Save())  # type: ignore[attr-defined]
    trainer.fit(module, training_data, held_out, ckpt_path=ckpt_path)
    state = module.trained_state()
    note.course.weights = {name: t for stage in strategy.collect_stages(state) for name, t in stage.items()}
    return note.course if strategy.is_global_zero else None


def resumed(workers: Workers, training: Training, change: Sequence[Split], folder: Path, steps: int) -> Course:
    """Train in parts, each with the next split, up to the last and back to the first."""
    whole = Course({}, {}, {})
    ckpt_path = None
    parts = [*change, *change[-2::-1]]
    ends = [number * steps // len(parts) + number - 1 for number in range(1, len(parts))]
    for number, (split, until) in enumerate(zip(parts, [*ends, steps], strict=True)):
        save_to = str(folder / f"{number}.ckpt")
        ranks = split.stages * split.replicas
        part = workers.run(ranks, train, training, split, str(folder), until, ckpt_path, save_to)[0]
        whole.losses.update(part.losses)
        whole.evaluations.update(part.evaluations)
        whole.weights, ckpt_path = part.weights, save_to
    return whole


def differences(ours: Course, undisturbed: Course) -> tuple[float, float, float]:
    """Return the largest differences of the losses, the evaluations and the weights."""
    assert ours.losses.keys() == undisturbed.losses.keys(), "not the same steps"
    assert ours.evaluations.keys() == undisturbed.evaluations.keys(), "not the same evaluations"
    loss = max(abs(ours.losses[step] - loss) for step, loss in undisturbed.losses.items())
    evaluation = max(abs(ours.evaluations[step] - loss) for step, loss in undisturbed.evaluations.items())
    weight = max(float((ours.weights[n] - w).norm() / w.norm()) for n, w in undisturbed.weights.items())
    return loss, evaluation, weight


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/resume.md")
    arguments = parser.parse_args()
    workers = Workers(4)
    head = ("| training | stages x replicas | loss | evaluation | weights |", "| --- | --- | --- | --- | --- |")
    report, failed = Report("resume", *head), False
    for training in TRAININGS:
        undisturbed: dict[tuple[Split, Scale], Course] = {}
        for change in CHANGES:
            with tempfile.TemporaryDirectory() as directory:
                folder, first = Path(directory), change[0]
                scale = replace(SCALE, layers=max(SCALE.layers, *(s.stages * s.virtual_stages for s in change)))
                make_model(folder, Case("base", tied=training.tied), scale)
                if (first, scale) not in undisturbed:
                    ranks = first.stages * first.replicas
                    undisturbed[first, scale] = workers.run(
                        ranks, train, training, first, directory, arguments.steps, None, None
                    )[0]
                loss, evaluation, weight = differences(
                    resumed(workers, training, change, folder, arguments.steps), undisturbed[first, scale]
                )
            failed |= max(loss, evaluation) > (0 if first == change[1] else LIMIT)
            report.row(
                f"| {training.name} | {' → '.join(map(str, change))} | {loss:.1e} | {evaluation:.1e} | {weight:.1e} |"
            )
    workers.close()
    report.line(f"{arguments.steps} steps, interrupted two to four times; limit {LIMIT:.0e}, and 0 without a change: "
                f"{'EXCEEDED THE LIMIT' if failed else 'all within'}")  # fmt: skip
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
