"""The options with which an optimizer and its schedules were created."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

HOW = {"foreach", "fused", "capturable", "differentiable", "triton"}
"""Options that affect how an optimizer computes, not what; changes to them are not reported."""

PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "lr_lambdas"}
"""Entries of a schedule's state that are not options, and ``lr_lambdas``, where functions are not saved."""


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of an optimizer's groups at creation; the learning rate is that before any schedule."""
    made = []
    for group in optimizer.param_groups:
        options = {key: number(value) for key, value in group.items() if key not in ("params", "initial_lr")}
        if "initial_lr" in group:
            options["lr"] = number(group["initial_lr"])
        made.append({key: value for key, value in options.items() if not isinstance(value, Tensor)})
    return made


def schedules_of(configs: Sequence[LRSchedulerConfig]) -> list[dict[str, Any]]:
    """Return each schedule's class and, with its options, its state at creation."""
    return [
        {"class": kind(config.scheduler), "state": copy.deepcopy(dict(config.scheduler.state_dict()))}
        for config in configs
    ]


def named_options(
    groups: Sequence[Mapping[str, Any]], unused: Sequence[bool], schedules: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the options of the optimizer and its schedules, under names for a message.

    Args:
        groups: See :func:`options_of`.
        unused: Whether each group has no parameters here: its options may then have been completed in another way.
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
    """Return the value of a scalar tensor; anything else unchanged."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
