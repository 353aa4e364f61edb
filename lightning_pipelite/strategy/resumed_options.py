"""Which options of an optimizer and its schedules hold when a training is resumed: those that are given now."""

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
    """Of each option the value that is given now, where it differs from what the checkpoint's training was given.

    torch and Lightning overwrite all options by the checkpoint's. Here what a schedule or a callback has made of an
    option in the course of the training is kept as long as the option itself is the same. A schedule that is another
    now goes on as if it had been this one from the beginning.

    Args:
        made: The options of the optimizer's ``groups`` and its ``schedules`` now, as
            :mod:`~lightning_pipelite.strategy.made_options` tells them when they have just been made.
        saved: The same of the training that is resumed.
        changes: To begin :attr:`changes` with.
    """

    def __init__(self, made: Mapping[str, Any], saved: Mapping[str, Any], changes: Sequence[str] = ()) -> None:
        self._made, self._saved = made, saved
        self.overrides: list[dict[str, Any]] = [{} for _ in made["groups"]]
        """By group, what holds in place of the checkpoint's."""
        self.changes: list[str] = [*changes]
        """What has changed, in words."""

    def compare_groups(self, optimizer: Optimizer) -> None:
        """Find the options of groups that are others now; of a checkpoint with as many groups."""
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
        """Find out how the schedules go on.

        Args:
            optimizer: As it was made. What this does to its groups does not matter: the checkpoint's are loaded next.
            configs: Its schedules, the same.
            states: Of the schedules in the checkpoint.
            counts: How often each schedule would have been stepped, to go by if the checkpoint has none.

        Returns:
            The states that the schedules are to load.

        Raises:
            ConfigurationError: If a schedule that is another now cannot be taken up.
        """
        made: list[dict[str, Any]] = self._made["schedules"]
        saved: list[dict[str, Any]] = self._saved["schedules"]
        if len(made) == len(saved) == len(states):
            before = len(self.changes)
            same = [self._compare(ours, theirs) for ours, theirs in zip(made, saved, strict=True)]
            if len(configs) > 1:
                if not all(same):
                    raise ConfigurationError(
                        f"ckpt_path: {(self.changes[before:] or self.changes)[0]}: where several schedules change one "
                        "learning rate, this cannot be taken up amid a training; give the former value."
                    )
                return states
            return [
                self._go_on(optimizer, config.scheduler, made[0], saved[0], states[0], same[0]) for config in configs
            ]
        self.changes.append(f"{len(made)} learning-rate schedules ({len(states)} in the checkpoint)")
        if len(configs) > 1:
            raise ConfigurationError(f"ckpt_path: there are {self.changes[-1]}; give the same ones.")
        if not configs:
            for override, options in zip(self.overrides, self._made["groups"], strict=True):
                override["lr"] = options["lr"]
            return []
        self._replay(optimizer, configs[0].scheduler, _count(states[0]) if states else counts[0])
        return [dict(configs[0].scheduler.state_dict())]

    def _compare(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        """Whether a schedule was made with the same options, as far as its state tells."""
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
                if key != "base_lrs":  # told of the groups
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
        """Return the state with which the one schedule goes on."""
        if isinstance(scheduler, ReduceLROnPlateau) and ours["class"] == theirs["class"]:
            # Its state is what it has seen. A learning rate that is another now holds until it is reduced.
            mine, past = ours["state"], theirs["state"]
            return {key: value if _same(mine.get(key), past.get(key)) else mine[key] for key, value in state.items()}
        if same and not _has_functions(scheduler):
            return state
        if same and type(scheduler) is LambdaLR:
            scheduler.base_lrs = list(state["base_lrs"])  # which somebody may have changed since
        made_of_groups = self._replay(optimizer, scheduler, _count(state), holds=not same)
        if same:  # what functions give is seen in what they gave when the checkpoint was written
            now, then = (number(rates[0]) if rates else None for rates in (scheduler.get_last_lr(), state["_last_lr"]))
            if _same(scheduler.get_last_lr(), state["_last_lr"]):
                functions = [each.get("lr_lambdas") for each in (ours["state"], theirs["state"])]
                given_now = "lr_lambdas" in state and not _same(*functions)
                return {**state, "lr_lambdas": [None] * len(state["lr_lambdas"])} if given_now else state
            self._tell("the learning rate that the schedule has come to", now, then)
            self._hold(made_of_groups)
        return dict(scheduler.state_dict())

    def _replay(self, optimizer: Optimizer, scheduler: Any, count: int, holds: bool = True) -> list[dict[str, Any]]:
        """Step a schedule that was just made ``count`` times, and return what that makes of the groups."""
        before = [dict(group) for group in optimizer.param_groups]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch misses the optimizer's steps
                if type(scheduler) is LambdaLR:  # its rates depend on the count alone
                    scheduler.last_epoch, scheduler._step_count, count = count - 1, count, 1
                for _ in range(count):
                    scheduler.step()
        except Exception as error:
            raise ConfigurationError(
                f"ckpt_path: the schedule {kind(scheduler)} that is given now cannot be taken up at the checkpoint's "
                f"step ({error}); give one that lasts longer, or the checkpoint's."
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
    """Take the options of callbacks out of their saved states, so that those that are given now hold.

    Of Lightning's own (2.6) EarlyStopping alone keeps one there. Others keep what they have seen.

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
    """How often a schedule has been stepped; one that is made of others may leave it to them."""
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
