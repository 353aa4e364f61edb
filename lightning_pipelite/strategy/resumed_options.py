"""The options of an optimizer and its schedules when a training is resumed: those given now take effect."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.made_options import HOW, PROGRESS, kind, number


class ResumedOptions:
    """Applies the options that are given now where they differ from those of the checkpoint's training.

    torch and Lightning overwrite all options with the checkpoint's. Here, what a schedule or a callback has made of an
    option during training is kept as long as the option itself is unchanged. A schedule that has changed continues as
    if it had been in use from the beginning.

    Args:
        made: The options now of the optimizer's ``groups`` and of its ``schedules``, as
            :mod:`~lightning_pipelite.strategy.made_options` returns them right after creation.
        saved: The same for the training that is resumed.
        changes: Changes with which :attr:`changes` begins.
    """

    def __init__(self, made: Mapping[str, Any], saved: Mapping[str, Any], changes: Sequence[str] = ()) -> None:
        self._made, self._saved = made, saved
        self.overrides: list[dict[str, Any]] = [{} for _ in made["groups"]]
        """For each group, the options that replace the checkpoint's."""
        self.changes: list[str] = [*changes]
        """The changes, in words."""

    def compare_groups(self, optimizer: Optimizer) -> None:
        """Find the options of groups that have changed; the checkpoint must have as many groups."""
        pairs = zip(self._made["groups"], self._saved["groups"], strict=True)
        for index, (ours, theirs) in enumerate(pairs):
            group = optimizer.param_groups[index]
            for key in sorted(ours.keys() & theirs.keys()):
                if not _same(ours[key], theirs[key]):
                    self.overrides[index][key] = group[key] if isinstance(group[key], Tensor) else ours[key]
                    if key == "lr" and "initial_lr" in group:
                        self.overrides[index]["initial_lr"] = group["initial_lr"]
                    if key not in HOW:
                        where = f" of parameter group {index}" if len(self.overrides) > 1 else ""
                        self._tell(f"{key}{where}", ours[key], theirs[key])

    def take_up(
        self,
        optimizer: Optimizer,
        configs: Sequence[LRSchedulerConfig],
        states: list[dict[str, Any]],
        counts: list[int],
    ) -> list[dict[str, Any]]:
        """Determine how the schedules continue.

        Args:
            optimizer: The optimizer as created. Its groups may be changed here: the checkpoint's are loaded next.
            configs: The schedules as created.
            states: The states of the schedules in the checkpoint.
            counts: How often each schedule would have been stepped, for a checkpoint without schedules.

        Returns:
            The states for the schedules to load.

        Raises:
            ConfigurationError: If a schedule that has changed cannot continue.
        """
        made: list[dict[str, Any]] = self._made["schedules"]
        saved: list[dict[str, Any]] = self._saved["schedules"]
        if len(made) == len(saved) == len(states):
            before = len(self.changes)
            same = [self._compare(ours, theirs) for ours, theirs in zip(made, saved, strict=True)]
            if len(configs) > 1:
                if not all(same):
                    raise ConfigurationError(
                        f"ckpt_path: {(self.changes[before:] or self.changes)[0]}: if several schedules change one "
                        "learning rate, their options cannot change when training resumes; restore the former value."
                    )
                return states
            return [
                self._go_on(optimizer, config.scheduler, made[0], saved[0], states[0], same[0]) for config in configs
            ]
        self.changes.append(f"{len(made)} learning-rate schedules ({len(states)} in the checkpoint)")
        if len(configs) > 1:
            raise ConfigurationError(f"ckpt_path: there are {self.changes[-1]}; use the same ones as before.")
        if not configs:
            for override, options in zip(self.overrides, self._made["groups"], strict=True):
                override["lr"] = options["lr"]
            return []
        self._replay(optimizer, configs[0].scheduler, _count(states[0]) if states else counts[0])
        return [dict(configs[0].scheduler.state_dict())]

    def _compare(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        """Return whether a schedule was created with the same options, as far as its state shows."""
        if ours["class"] != theirs["class"]:
            self._tell("the schedule", ours["class"], theirs["class"])
            return False
        return self._compare_states(ours["class"], ours["state"], theirs["state"])

    def _compare_states(self, kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
        same = True
        for key in sorted((ours.keys() & theirs.keys()) - PROGRESS):
            if key == "_schedulers" and len(ours[key]) == len(theirs[key]):
                for mine, other in zip(ours[key], theirs[key], strict=True):
                    same &= self._compare_states(kind, mine, other)
            elif not _same(ours[key], theirs[key]):
                same = False
                if key != "base_lrs":  # reported for the groups
                    self._tell(f"{kind}'s {key.strip('_')}", ours[key], theirs[key])
        return same

    def _go_on(
        self,
        optimizer: Optimizer,
        scheduler: Any,
        ours: dict[str, Any],
        theirs: dict[str, Any],
        state: dict[str, Any],
        same: bool,
    ) -> dict[str, Any]:
        """Return the state with which a single schedule continues."""
        if isinstance(scheduler, ReduceLROnPlateau) and ours["class"] == theirs["class"]:
            # Its state is what it has seen. A learning rate that has changed holds until it is reduced.
            mine, past = ours["state"], theirs["state"]
            return {key: value if _same(mine.get(key), past.get(key)) else mine[key] for key, value in state.items()}
        if same and not _has_functions(scheduler):
            return state
        if same and type(scheduler) is LambdaLR:
            scheduler.base_lrs = list(state["base_lrs"])  # which may have been changed since
        made_of_groups = self._replay(optimizer, scheduler, _count(state), holds=not same)
        if same:  # functions are compared by their values at the time of the checkpoint
            now, then = (number(rates[0]) if rates else None for rates in (scheduler.get_last_lr(), state["_last_lr"]))
            if _same(scheduler.get_last_lr(), state["_last_lr"]):
                functions = [each.get("lr_lambdas") for each in (ours["state"], theirs["state"])]
                given_now = "lr_lambdas" in state and not _same(*functions)
                return {**state, "lr_lambdas": [None] * len(state["lr_lambdas"])} if given_now else state
            self._tell("the schedule's current learning rate", now, then)
            self._hold(made_of_groups)
        return dict(scheduler.state_dict())

    def _replay(self, optimizer: Optimizer, scheduler: Any, count: int, holds: bool = True) -> list[dict[str, Any]]:
        """Step a newly created schedule ``count`` times, and return the resulting options of the groups."""
        before = [dict(group) for group in optimizer.param_groups]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped
                if type(scheduler) is LambdaLR:  # its rates depend on the count alone
                    scheduler.last_epoch, scheduler._step_count, count = count - 1, count, 1
                for _ in range(count):
                    scheduler.step()
        except Exception as error:
            raise ConfigurationError(
                f"ckpt_path: the schedule {kind(scheduler)} that is now configured cannot be advanced to the "
                f"checkpoint's step ({error}); use one that lasts longer, or the checkpoint's."
            ) from error
        made = [
            {
                key: new
                for key, new in group.items()
                if key == "lr" or (key != "params" and not _same(new, old.get(key)))
            }
            for group, old in zip(optimizer.param_groups, before, strict=True)
        ]
        if holds:
            self._hold(made)
        return made

    def _hold(self, made_of_groups: list[dict[str, Any]]) -> None:
        for override, made in zip(self.overrides, made_of_groups, strict=True):
            override.update(made)

    def _tell(self, what: str, now: Any, then: Any) -> None:
        change = f"{what} is {_shown(now)} ({_shown(then)} in the checkpoint)"
        if change not in self.changes:
            self.changes.append(change)


def keep_callback_options(callbacks: Sequence[Callback], states: dict[str, Any]) -> list[str]:
    """Replace the options in the saved states of callbacks with those given now.

    Of Lightning's own callbacks (2.6), only EarlyStopping saves one. Others save only what they have seen.

    Returns:
        What has changed, in words.
    """
    changes = []
    for callback in callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state and state["patience"] != callback.patience:
            changes.append(f"EarlyStopping's patience is {callback.patience} ({state['patience']} in the checkpoint)")
            state["patience"] = callback.patience
    return changes


def _has_functions(scheduler: Any) -> bool:
    return hasattr(scheduler, "lr_lambdas") or any(map(_has_functions, getattr(scheduler, "_schedulers", ())))


def _count(state: Mapping[str, Any]) -> int:
    """Return how often a schedule has been stepped; one that combines others may leave the count to them."""
    return int(state["last_epoch"]) if "last_epoch" in state else _count(state["_schedulers"][0])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _same(one: Any, other: Any) -> bool:
    one, other = number(one), number(other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
