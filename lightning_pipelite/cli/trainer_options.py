"""Checks of Trainer options that make no sense but Lightning accepts, or that it refuses without naming them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lightning_pipelite.errors import ConfigurationError

_POSITIVE = ("accumulate_grad_batches", "check_val_every_n_epoch", "gradient_clip_val", "limit_train_batches")
_LIMITS = {"max_steps": "steps", "max_epochs": "epochs"}
STRATEGIES = ("pipelite",)
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")


def check_seed(seed: int) -> None:
    """Refuse a seed that is out of range.

    Raises:
        ConfigurationError: If it is.
    """
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed_everything is {seed}; give an integer from 0 to {2**32 - 1}.")


def check_trainer_options(
    options: Mapping[str, Any], strategies: Collection[str] = STRATEGIES, accelerators: Collection[str] = ACCELERATORS
) -> None:
    """Refuse values that are out of range.

    Args:
        options: Options of the Trainer by name; those that are missing or None are not checked.
        strategies: The names of strategies that can train the module.
        accelerators: The names of accelerators that Lightning knows.

    Raises:
        ConfigurationError: If one is out of range; the message names the option.
    """

    def refuse(name: str, remedy: str) -> None:
        value = options[name]
        shown = repr(value) if isinstance(value, str) else value
        raise ConfigurationError(f"trainer.{name} is {shown}; {remedy}.")

    given = {name: value for name, value in options.items() if value is not None}
    for name in _POSITIVE:  # Lightning accepts any value
        if name in given and given[name] <= 0:
            refuse(name, "give a number above 0, or leave it out")
    if given.get("log_every_n_steps", 0) < 0:
        refuse("log_every_n_steps", "give 0 or more")
    for name, counted in _LIMITS.items():
        if given.get(name, 0) < -1:
            refuse(name, f"give a number of {counted}, or -1 for no limit")
    if given.get("num_nodes", 1) < 1:
        refuse("num_nodes", "give 1 or more")
    devices = given.get("devices", "auto")
    if devices == 0 or (
        isinstance(devices, str) and not re.fullmatch(r"auto|-?\d+(\s*,\s*\d+)*\s*,?", devices.strip())
    ):
        refuse("devices", "give the number of devices, a list of device indices, or auto")
    if isinstance(accelerator := given.get("accelerator"), str) and accelerator not in accelerators:
        refuse("accelerator", "set it to gpu, cpu or auto")
    if isinstance(strategy := given.get("strategy"), str) and strategy not in strategies:
        raise ConfigurationError(
            f"PipeLiteModule requires PipeLiteStrategy, not {strategy}: set trainer.strategy to pipelite."
        )
    if isinstance(time := given.get("max_time"), str) and not re.search(r"\d", time):
        refuse("max_time", "write it as days:hours:minutes:seconds, such as 00:12:00:00")
    if given.get("overfit_batches"):
        raise ConfigurationError(
            "trainer.overfit_batches needs data whose order Lightning can change, but that of packed data is fixed; "
            "set data.max_sequences to train on a few sequences."
        )
