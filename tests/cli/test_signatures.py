"""Signatures read from source files agree with those that Python reports."""

from __future__ import annotations

import importlib
import inspect
from typing import get_type_hints

import pytest

from lightning_pipelite.cli.signatures import signature_of

NOT_READ = {
    "lightning.pytorch.Trainer": (
        "accelerator strategy precision logger callbacks max_time val_check_interval deterministic profiler plugins "
        "default_root_dir"
    ),
    "lightning.pytorch.callbacks.EarlyStopping": "",
    "lightning.pytorch.callbacks.ModelCheckpoint": "dirpath train_time_interval",
    "lightning_pipelite.PipeLiteModule": "adapter activation_memory optimizer",
    "lightning_pipelite.PipeLiteStrategy": "cluster_environment accelerator parallel_devices",
    "lightning_pipelite.adapters.ControlAdapter": "",
    "lightning_pipelite.adapters.Full": "",
    "lightning_pipelite.adapters.LoRA": "",
    "lightning_pipelite.callbacks.EvalSchedule": "",
    "lightning_pipelite.callbacks.SaveTrained": "",
    "lightning_pipelite.callbacks.TimedCheckpoint": "",
    "torch.optim.AdamW": "params lr betas",
}
"""Classes, and their parameters whose types are not read."""


@pytest.mark.parametrize("path", NOT_READ)
def test_as_python_has_it(path: str) -> None:
    module, _, name = path.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    read = signature_of(path)
    assert read is not None
    parameters = inspect.signature(made.__init__).parameters
    assert [*read.types] == [*parameters][1:]
    assert not read.takes_others
    hints = get_type_hints(made.__init__)
    assert {each for each, kind in read.types.items() if kind is None} == {*NOT_READ[path].split()}
    for each, kind in read.types.items():
        if kind is not None:
            assert kind == hints[each]


def test_what_is_not_read() -> None:
    assert signature_of("optimi.Adamm") is None
    assert signature_of("no_such_package.Adapter") is None
    assert signature_of("LoRA") is None
    assert signature_of("lightning.pytorch.callbacks.BasePredictionWriter") is not None
    assert signature_of("lightning_pipelite.errors.ConfigurationError") is None  # it has no __init__ of its own
    further = signature_of("lightning.pytorch.loggers.TensorBoardLogger")
    assert further is not None
    assert further.takes_others
