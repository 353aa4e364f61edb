"""The table: one row for each option of a Trainer, and how a pipeline then differs from DDP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)

from lightning_pipelite.callbacks import EvalSchedule, TimedCheckpoint
from trainer_parts import (
    Callbacks,
    Data,
    Raise,
    SaveAt,
    StopAfter,
    loader,
    one_cycle,
    plateau,
    saving,
    scheduled,
    step_lr,
    stream,
    two_schedulers,
)

# How a pipeline differs in all rows: the hooks that it does not call, as the engine runs a whole step, and those that
# it calls on one rank of a node.
NOT_CALLED = ("training_step", "validation_step")
ONCE_A_NODE = ("prepare_data",)
# When training starts, a pipeline checks that a checkpoint can hold its state, by rehearsing a save.
REHEARSED = ("on_save_checkpoint", "state_dict")
# In some rows: it only loads a checkpoint after the stages are built.
LOADS_LATER = ("on_load_checkpoint", "log_graph", "save")


@dataclass(frozen=True)
class Row:
    """One training, or several one after another.

    Args:
        trainer: Options of the Trainer.
        callbacks: Creates callbacks, given the folder of the row.
        module: Options of the module.
        data: Creates the data: a loader for training and one or several for evaluation, or a data module.
        calls: Calls of the Trainer; a second ``fit`` trains for one more epoch.
        before: Options that differ in an earlier training, in the same folder.
        ckpt_path: Checkpoint of the training after that; a relative path is within the folder.
        replicas: Number of replicas with which it is compared too.
        differs: Hooks that are called at another place, see above.
        refused: The error with several processes.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callbacks = lambda folder: []
    module: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = lambda: (loader(), loader(2))
    calls: tuple[str, ...] = ("fit",)
    before: dict[str, Any] | None = None
    ckpt_path: str | None = None
    replicas: int = 1
    differs: tuple[str, ...] = ()
    refused: str = ""


ALONE = "can only be used with a single process"

ROWS: dict[str, Row] = {
    # How long
    "max_epochs": Row({"max_epochs": 2}, replicas=2),
    "max_epochs 0": Row({"max_epochs": 0}),
    "max_steps": Row({"max_steps": 7, "max_epochs": -1}),
    "max_steps at an epoch's end": Row({"max_steps": 6, "max_epochs": -1}),
    "max_steps 0": Row({"max_steps": 0}),
    "max_steps in mid-epoch, accumulated": Row({"max_steps": 4, "max_epochs": -1, "accumulate_grad_batches": 2}, replicas=2),
    "max_steps and max_epochs": Row({"max_steps": 10, "max_epochs": 3}),
    "max_epochs first": Row({"max_steps": 100, "max_epochs": 2}),
    "min_steps": Row({"max_epochs": 3, "min_steps": 8}, lambda _: [StopAfter(3)]),
    "min_epochs": Row({"max_epochs": 4, "min_epochs": 2}, lambda _: [StopAfter(3)]),
    "max_time, spent": Row({"max_epochs": 2, "max_time": {"seconds": 0}}),
    "max_time, spent after a step": Row({"max_epochs": 2}, lambda _: [Timer(timedelta(microseconds=1))]),
    "max_time, spent after an epoch": Row({"max_epochs": 2}, lambda _: [Timer(timedelta(microseconds=1), interval="epoch")]),
    "max_time, enough": Row({"max_epochs": 1, "max_time": "00:01:00:00"}),
    "stopped within an epoch": Row({"max_epochs": 3}, lambda _: [StopAfter(8)]),
    "stopped within a step": Row({"max_epochs": 3, "accumulate_grad_batches": 4}, lambda _: [StopAfter(8)]),
    "stopped as an epoch starts": Row({"max_epochs": 3}, lambda _: [StopAfter(7, "on_train_epoch_start")]),
    "stopped as an epoch ends": Row({"max_epochs": 3}, lambda _: [StopAfter(6, "on_train_epoch_end")]),
    "stopped in an evaluation": Row({"max_epochs": 3, "val_check_interval": 4}, lambda _: [StopAfter(4, "on_validation_end")]),
    "fast_dev_run": Row({"fast_dev_run": True}, saving()),
    "fast_dev_run 3": Row({"fast_dev_run": 3, "accumulate_grad_batches": 2}),
    "overfit_batches": Row({"max_epochs": 3, "overfit_batches": 2}),
    # How much
    "limit_train_batches": Row({"max_epochs": 2, "limit_train_batches": 4}),
    "limit_train_batches, a share": Row({"max_epochs": 2, "limit_train_batches": 0.55}),
    "limit_train_batches 0": Row({"max_epochs": 2, "limit_train_batches": 0}),
    "limit_val_batches": Row({"max_epochs": 2, "limit_val_batches": 1}),
    "limit_val_batches, a share": Row({"max_epochs": 2, "limit_val_batches": 0.5}),
    "limit_val_batches 0": Row({"max_epochs": 2, "limit_val_batches": 0}),
    "no validation loader": Row({"max_epochs": 2}, data=lambda: (loader(), None)),
    "a loader that drops its last": Row({"max_epochs": 2}, data=lambda: (loader(drop_last=True), loader(3))),
    "a shuffled loader": Row({"max_epochs": 2}, data=lambda: (loader(shuffle=True), loader(3))),
    "a stream": Row({"max_epochs": 2}, data=lambda: (stream(), loader(3))),
    "a stream by steps, accumulated": Row({"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 4}, data=lambda: (stream(), loader(3))),
    "a stream, limited": Row({"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": 3}, data=lambda: (stream(), loader(3))),
    "a stream, evaluated by batches": Row({"max_epochs": 2, "val_check_interval": 4}, data=lambda: (stream(), loader(3))),
    "a stream to evaluate on": Row({"max_epochs": 2}, data=lambda: (loader(), stream(3))),
    "a stream to evaluate on, limited": Row({"max_epochs": 2, "limit_val_batches": 2}, data=lambda: (loader(), stream(3))),
    "several validation loaders": Row({"max_epochs": 2, "val_check_interval": 3}, data=lambda: (loader(), [loader(2), loader(3), loader(1)])),
    "several validation loaders, limited": Row({"max_epochs": 1, "limit_val_batches": 2}, data=lambda: (loader(), [loader(2), loader(3), loader(1)])),
    "a data module": Row({"max_epochs": 2}, data=Data),
    "reload_dataloaders_every_n_epochs 1": Row({"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, data=Data),
    "reload_dataloaders_every_n_epochs 2": Row({"max_epochs": 4, "reload_dataloaders_every_n_epochs": 2}, data=Data),
    "the distributed sampler": Row({"max_epochs": 2, "use_distributed_sampler": True}, data=lambda: (loader(12), loader(6)), replicas=2),
    "the rest of an epoch skipped": Row({"max_epochs": 2}, module={"skips": 4}),
    "the rest of an epoch skipped within a step": Row({"max_epochs": 2, "accumulate_grad_batches": 4}, module={"skips": 2}),
    # When it evaluates
    "val_check_interval": Row({"max_epochs": 2, "val_check_interval": 4}),
    "val_check_interval within a step": Row({"max_epochs": 2, "val_check_interval": 3, "accumulate_grad_batches": 2}, replicas=2),
    "val_check_interval, a share": Row({"max_epochs": 2, "val_check_interval": 0.4}),
    "val_check_interval over epochs": Row({"max_epochs": 3, "val_check_interval": 5, "check_val_every_n_epoch": None}),
    "val_check_interval longer than an epoch": Row({"max_epochs": 3, "val_check_interval": 8, "check_val_every_n_epoch": None}),
    "val_check_interval by time": Row({"max_epochs": 2, "val_check_interval": "00:00:00:00", "limit_train_batches": 3}, refused=ALONE),
    "check_val_every_n_epoch": Row({"max_epochs": 4, "check_val_every_n_epoch": 2, "limit_train_batches": 3}),
    "num_sanity_val_steps": Row({"max_epochs": 1, "num_sanity_val_steps": 2}),
    "num_sanity_val_steps 0": Row({"max_epochs": 1, "num_sanity_val_steps": 0}),
    "num_sanity_val_steps -1": Row({"max_epochs": 1, "num_sanity_val_steps": -1}),
    # The step
    "accumulate_grad_batches": Row({"max_epochs": 2, "accumulate_grad_batches": 3}, replicas=2),
    "accumulate_grad_batches, the last step short": Row({"max_epochs": 2, "accumulate_grad_batches": 4}),
    "accumulate_grad_batches of more than an epoch": Row({"max_epochs": 2, "accumulate_grad_batches": 10}),
    "accumulation that changes": Row({"max_epochs": 3}, lambda _: [GradientAccumulationScheduler({0: 2, 2: 4})]),
    "gradient_clip_val": Row({"max_epochs": 2, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}, replicas=2),
    "clip by value": Row({"max_epochs": 2, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}, replicas=2),
    "detect_anomaly": Row({"max_epochs": 1, "detect_anomaly": True}),
    "deterministic": Row({"max_epochs": 1, "deterministic": True}),
    "a profiler": Row({"max_epochs": 1, "profiler": "simple"}),
    "a summary": Row({"max_epochs": 1, "enable_model_summary": True}),
    "a progress bar": Row({"max_epochs": 1, "enable_progress_bar": True}),
    "inference_mode": Row({"max_epochs": 1, "inference_mode": False}),
    # Rates
    "a rate by step": Row({"max_epochs": 2, "accumulate_grad_batches": 2}, module=scheduled(step_lr, interval="step")),
    "a rate by step, seldom": Row({"max_epochs": 2}, module=scheduled(step_lr, interval="step", frequency=3)),
    "a rate by epoch": Row({"max_epochs": 2}, module=scheduled(step_lr, interval="epoch")),
    "a rate by epoch, stopped within one": Row({"max_epochs": 3}, lambda _: [StopAfter(8)], module=scheduled(step_lr, interval="epoch")),
    "a rate by epoch, seldom": Row({"max_epochs": 4, "limit_train_batches": 2}, module=scheduled(step_lr, interval="epoch", frequency=2)),
    "a rate by the evaluation": Row({"max_epochs": 4, "limit_train_batches": 3}, module=scheduled(plateau, monitor="eval/loss")),
    "a rate by the loss of a step": Row({"max_epochs": 1}, module=scheduled(plateau, monitor="train/loss", interval="step")),
    "a rate for the number of steps": Row({"max_epochs": 2, "accumulate_grad_batches": 4}, module=scheduled(one_cycle, interval="step")),
    "two schedulers": Row({"max_epochs": 2}, module={"scheduler": two_schedulers}),
    # What is logged
    "log_every_n_steps": Row({"max_epochs": 2, "log_every_n_steps": 3, "accumulate_grad_batches": 2}),
    "log_every_n_steps 0": Row({"max_epochs": 1, "log_every_n_steps": 0}),
    "the rates": Row({"max_epochs": 2}, lambda _: [LearningRateMonitor()], module=scheduled(step_lr, interval="step")),
    "the rates of epochs": Row({"max_epochs": 2}, lambda _: [LearningRateMonitor("epoch")], module=scheduled(step_lr, interval="epoch")),
    # Callbacks
    "early stopping": Row({"max_epochs": 20, "limit_train_batches": 3}, lambda _: [EarlyStopping("eval/loss", min_delta=0.1, patience=1)]),
    "early stopping at a threshold": Row({"max_epochs": 20, "val_check_interval": 3, "accumulate_grad_batches": 2},
        lambda _: [EarlyStopping("eval/loss", stopping_threshold=0.75)]),
    "early stopping on the training": Row({"max_epochs": 20},
        lambda _: [EarlyStopping("train/loss", min_delta=0.1, patience=1, check_on_train_epoch_end=True)]),
    "checkpoints as Lightning makes them": Row({"max_epochs": 2, "enable_checkpointing": True}),
    "the best checkpoints": Row({"max_epochs": 4, "limit_train_batches": 3},
        saving(monitor="eval/loss", save_top_k=2, filename="{epoch}-{eval/loss:.3f}", auto_insert_metric_name=False)),
    "the worst checkpoint": Row({"max_epochs": 2}, saving(monitor="eval/loss", mode="max", filename="{epoch}")),
    "all checkpoints by steps": Row({"max_epochs": 2}, saving(save_top_k=-1, every_n_train_steps=4)),
    "checkpoints by steps, accumulated": Row({"max_epochs": 2, "accumulate_grad_batches": 2}, saving(every_n_train_steps=2, save_top_k=-1)),
    "checkpoints by steps and the loss": Row({"max_epochs": 2}, saving(every_n_train_steps=2, monitor="train/loss", save_top_k=3)),
    "checkpoints by epochs": Row({"max_epochs": 4, "limit_train_batches": 3}, saving(every_n_epochs=2, save_top_k=-1)),
    "checkpoints before the evaluation": Row({"max_epochs": 2, "val_check_interval": 3}, saving(save_on_train_epoch_end=True, save_top_k=-1)),
    "checkpoints after each evaluation": Row({"max_epochs": 2, "val_check_interval": 4}, saving(save_top_k=-1)),
    "the last checkpoint": Row({"max_epochs": 2}, saving(save_last=True)),
    "the last checkpoint alone": Row({"max_epochs": 2}, saving(save_last=True, save_top_k=0)),
    "the last checkpoint, a link": Row({"max_epochs": 2}, saving(save_last="link")),
    "checkpoints by time": Row({"max_epochs": 1}, saving(train_time_interval=timedelta(0), save_top_k=-1)),
    "two kinds of checkpoints": Row({"max_epochs": 2}, lambda folder: [
        ModelCheckpoint(folder / "best", monitor="eval/loss"), ModelCheckpoint(folder / "all", "{step}", every_n_train_steps=4, save_top_k=-1)]),
    "weights alone": Row({"max_epochs": 2}, saving(save_weights_only=True)),
    "no checkpoints": Row({"max_epochs": 2}, saving(save_top_k=0)),
    "two kinds of checkpoints in one folder": Row({"max_epochs": 3, "limit_train_batches": 3}, lambda folder: [
        ModelCheckpoint("saved", "{epoch}", monitor="eval/loss", save_top_k=2), ModelCheckpoint("saved", "{epoch}", save_top_k=-1, every_n_epochs=1)]),
    "the best checkpoints of one name": Row({"max_epochs": 4, "limit_train_batches": 3}, saving("saved", "best", monitor="eval/loss", save_top_k=2)),
    "a checkpoint of one name": Row({"max_epochs": 2}, saving("saved", "best")),
    "a checkpoint on an error": Row({"max_epochs": 2}, lambda folder: [Raise(8), ModelCheckpoint("saved", save_on_exception=True)], refused=ALONE),
    "a checkpoint on an error within a step": Row({"max_epochs": 2, "accumulate_grad_batches": 2}, lambda folder: [Raise(8), ModelCheckpoint("saved", save_on_exception=True)], refused=ALONE),
    "a checkpoint on an error alone": Row({"max_epochs": 2}, lambda folder: [Raise(8), OnExceptionCheckpoint("saved"), ModelCheckpoint("other")], refused=ALONE),
    "checkpoints of one's own": Row({"max_epochs": 2, "accumulate_grad_batches": 2}, lambda folder: [SaveAt(folder / "own", 3, 5, 8)]),
    # The project's own
    "EvalSchedule": Row({"max_epochs": 2, "accumulate_grad_batches": 2}, lambda _: [EvalSchedule(3)]),
    "TimedCheckpoint": Row({"max_epochs": 2}, lambda _: [TimedCheckpoint(1e-9, 4, "saved", monitor="eval/loss")]),
    # Again
    "fit, then fit on": Row({"max_epochs": 1}, calls=("fit", "fit")),
    "validate, fit, validate": Row({"max_epochs": 1}, calls=("validate", "fit", "validate")),
    "resumed at an epoch's end": Row({"max_epochs": 2}, saving("saved", save_last=True), before={"max_epochs": 1}, ckpt_path="last", differs=LOADS_LATER),
    "resumed within an epoch": Row({"max_epochs": 2}, saving("saved", "{step}", every_n_train_steps=4, save_top_k=-1),
        before={"max_epochs": 1}, ckpt_path="saved/step=4.ckpt", differs=LOADS_LATER),
    "resumed by steps": Row({"max_steps": 10, "max_epochs": -1}, saving("saved", "{step}", every_n_train_steps=4, save_top_k=-1),
        before={"max_steps": 9, "max_epochs": -1}, ckpt_path="saved/step=8.ckpt", differs=LOADS_LATER),
    "resumed when complete": Row({"max_epochs": 2}, saving("saved", save_last=True), before={"max_epochs": 2}, ckpt_path="last", differs=LOADS_LATER),
    "resumed with a rate": Row({"max_epochs": 2}, saving("saved", save_last=True), before={"max_epochs": 1}, ckpt_path="last",
        module=scheduled(step_lr, interval="step"), differs=LOADS_LATER),
    "the best evaluated": Row({"max_epochs": 2}, saving("saved", monitor="eval/loss", mode="max"), calls=("fit", "validate best"), differs=LOADS_LATER),
    "the last evaluated": Row({"max_epochs": 2}, saving("saved", save_last=True), calls=("fit", "validate last"), differs=LOADS_LATER),
    "resumed early stopping": Row({"max_epochs": 9}, lambda _: [EarlyStopping("eval/loss", min_delta=0.1, patience=2), ModelCheckpoint("saved", save_last=True)],
        before={"max_epochs": 2}, ckpt_path="last", differs=LOADS_LATER),
}  # fmt: skip
