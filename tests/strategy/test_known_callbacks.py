"""Callbacks, hooks, plugins and flags: each either works as documented or is refused before anything is loaded."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision, TorchCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.tuner import Tuner

from former_jobs import fit
from hook_jobs import CALLED, HOOKS, hooks_called
from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.checks import check_options
from lightning_pipelite.strategy.known_callbacks import KNOWN
from lightning_pipelite.strategy.module_hooks import NOT_CALLED
from processes import Workers
from stage_jobs import Module
from stage_models import Model, floats, linears

REFUSED: dict[str, dict[str, Any]] = {
    "BackboneFinetuning": {},
    "BaseFinetuning": {},
    "BatchSizeFinder": {},
    "EMAWeightAveraging": {},
    "LearningRateFinder": {},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "WeightAveraging": {},
}
FLAGS = {
    "refused": {
        "precision": "bf16-mixed", "plugins": AsyncCheckpointIO(), "sync_batchnorm": True, "model_registry": "registry",
    },
    # With PackedDataModule, whose order is fixed, or where a callback contradicts the flag: see tests/errors.
    "refused in places": {"overfit_batches", "accumulate_grad_batches", "strategy", "callbacks"},
    # Shown by the table in test_trainer_flags.py, which compares with DDP, or by a separate test.
    "works": {
        "accelerator", "devices", "num_nodes", "logger", "fast_dev_run", "max_epochs", "min_epochs", "max_steps",
        "min_steps", "max_time", "limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval",
        "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing",
        "enable_progress_bar", "enable_model_summary", "gradient_clip_val", "gradient_clip_algorithm",
        "deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "profiler", "detect_anomaly",
        "barebones", "reload_dataloaders_every_n_epochs", "default_root_dir", "enable_autolog_hparams",
    },
    "of predict alone": {"limit_predict_batches"},
}  # fmt: skip


def module() -> Module:
    return Module(Model(linears(2), floats(2)))


def said(its: L.LightningModule | None = None, **flags: Any) -> str:
    """Return the message that refuses a Trainer before anything is loaded, or an empty string."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    try:
        trainer = L.Trainer(strategy=PipeLiteStrategy(), **{"devices": 1, **quiet, **flags})
        check_options(trainer, its or module())
    except ConfigurationError as error:
        return str(error)
    return ""


def test_each_of_lightnings_callbacks_is_known_or_refused() -> None:
    kinds = {name: each for name, each in vars(lightnings).items() if inspect.isclass(each)}
    known = {name for name, each in kinds.items() if issubclass(each, KNOWN)}
    assert known | {*REFUSED, "Callback"} == {*kinds}
    assert not known & {*REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_the_weights_before_the_stages_are_made_is_refused(name: str) -> None:
    class Own(getattr(lightnings, name)):  # type: ignore[misc]
        pass

    for kind in (getattr(lightnings, name), Own):
        sentence = said(callbacks=[kind(**REFUSED[name])])
        assert sentence.startswith(f"the callback {kind.__name__}")
        assert "leave it out, and " in sentence


def test_users_own_callbacks_and_known_ones_are_let_in() -> None:
    class Own(L.Callback):
        pass

    class Patient(lightnings.EarlyStopping):
        pass

    assert said(callbacks=[Own(), Patient("anything"), lightnings.LambdaCallback(), lightnings.Timer()]) == ""


def test_the_tuner_is_refused() -> None:  # Lightning itself refuses scale_batch_size
    trainer = L.Trainer(strategy=PipeLiteStrategy(), devices=1, accelerator="cpu", logger=False)
    its: Any = module()
    its.lr = 0.1
    with pytest.raises(ConfigurationError, match="is not supported by PipeLiteStrategy"):
        Tuner(trainer).lr_find(its, its.model.batches)


def test_the_callbacks_that_a_module_brings_are_held_to_the_same(workers: Workers, tmp_path: Path) -> None:
    ((ended,),) = workers.run(1, fit, str(tmp_path), [{"brings_averages": True}])
    assert ended["refused"].startswith("the callback EMAWeightAveraging")


def test_a_plan_of_micro_batches_is_resumed(workers: Workers, tmp_path: Path) -> None:
    """Four micro-batches an epoch: 4 steps, then 2, then 2."""
    jobs = [{"callback": "scheduled", "max_epochs": n, "ckpt_path": "last" if n > 1 else None} for n in (1, 2, 3)]
    ((first, second, third),) = workers.run(1, fit, str(tmp_path), jobs)
    assert first["refused"] == second["refused"] == third["refused"] == ""
    assert (first["steps"], second["steps"], third["steps"]) == (4, 6, 8)


# Hooks and plugins


def test_every_hook_of_a_module_is_called_or_refused_or_told() -> None:
    """Fails if a new Lightning adds a hook, which must then be classified."""
    from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks

    public = {name for kind in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(kind) if name[0] != "_"}
    assert {*HOOKS["called"], *HOOKS["not for training"]} >= public
    assert not public & {*NOT_CALLED}


def test_the_hooks_that_are_called(workers: Workers, tmp_path: Path) -> None:
    (found,) = workers.run(1, hooks_called, str(tmp_path))
    assert found == CALLED


@pytest.mark.parametrize("name", NOT_CALLED)
@pytest.mark.parametrize("on", ["class", "instance"])
def test_a_hook_that_would_be_passed_over_is_refused(name: str, on: str) -> None:
    own = type("Own", (Module,), {name: lambda self, *_, **__: None} if on == "class" else {})
    its = own(Model(linears(2), floats(2)))
    if on == "instance":
        setattr(its, name, lambda *_, **__: None)
    assert said(its).startswith(f"Own.{name} is never called by PipeLiteStrategy: ")


def test_a_plugin_that_would_be_passed_over_is_refused() -> None:
    class Own(Precision):
        pass

    for plugin in (AsyncCheckpointIO(), Own(), MixedPrecision("bf16-mixed", "cpu")):
        assert "is not supported by PipeLiteStrategy" in said(plugins=[plugin])
    assert said(plugins=[TorchCheckpointIO(), Precision()]) == ""


# Flags


def test_every_flag_of_the_trainer_is_in_its_place() -> None:
    """Fails if a new Lightning adds a flag, which must then be classified."""
    assert {name for names in FLAGS.values() for name in names} == {*inspect.signature(L.Trainer).parameters}


@pytest.mark.parametrize("name", FLAGS["refused"])
def test_a_flag_that_cannot_work_is_refused(name: str) -> None:
    assert "is not supported by PipeLiteStrategy" in said(**{name: FLAGS["refused"][name]})  # type: ignore[index]


def test_a_limit_that_is_no_number_is_refused() -> None:
    assert said(gradient_clip_val=float("nan")).startswith("trainer.gradient_clip_val is NaN")
    for number in (None, 0, 0.5, 1, float("inf")):
        assert said(gradient_clip_val=number) == ""


def test_evaluations_by_the_clock_are_for_one_process() -> None:
    """Each rank has its own clock, but all ranks must evaluate together."""
    for interval in ("00:00:10:00", timedelta(minutes=10), {"minutes": 10}):
        sentence = said(val_check_interval=interval, devices=2)
        assert sentence.startswith("trainer.val_check_interval as a time can only be used with a single process")
        assert said(val_check_interval=interval) == ""
    assert said(val_check_interval=10, devices=2) == ""
