"""With what options an optimizer and its schedules were made."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

HOW = {"foreach", "fused", "capturable", "differentiable", "triton"}
"""How an optimizer computes, not what: of this no word is said."""

PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "lr_lambdas"}
"""What a schedule's state has beside its options; of a function that is an option, a state has nothing."""


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what the groups of an optimizer were made with; the learning rate is that before any schedule."""
    made = []
    for group in optimizer.param_groups:
        options = {key: number(value) for key, value in group.items() if key not in ("params", "initial_lr")}
        if "initial_lr" in group:
            options["lr"] = number(group["initial_lr"])
        made.append({key: value for key, value in options.items() if not isinstance(value, Tensor)})
    return made


def schedules_of(configs: Sequence[LRSchedulerConfig]) -> list[dict[str, Any]]:
    """Return what the schedules were made with."""
    return [
        {"class": kind(config.scheduler), "state": copy.deepcopy(dict(config.scheduler.state_dict()))}
        for config in configs
    ]


def named_options(
    groups: Sequence[Mapping[str, Any]], unused: Sequence[bool], schedules: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the optimizer and its schedules were made with, by names for a message.

    Args:
        groups: See :func:`options_of`.
        unused: Whether a group has no parameters here: its options may have been completed in another way.
        schedules: See :func:`schedules_of`.
    """
    found = {
        f"the optimizer's {key}{f' of group {index}' if len(groups) > 1 else ''}": value
        for index, options in enumerate(groups)
        if not unused[index]
        for key, value in options.items()
        if key not in HOW
    }
    for schedule in schedules:
        found["the class of the schedule"] = schedule["class"]
        found |= {
            f"{schedule['class']}'s {key}": value
            for key, value in schedule["state"].items()
            if key not in PROGRESS and isinstance(value, (bool, int, float, str))
        }
    return found


def kind(scheduler: Any) -> str:
    """Return the name of a schedule's class."""
    return type(scheduler).__name__


def number(value: Any) -> Any:
    """Return a scalar tensor's value; all else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
