"""Options that must be the same on every rank, or the ranks would train differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_pipelite.errors import ConfigurationError

_OF_THE_TRAINER = (
    "max_steps", "max_epochs", "min_steps", "min_epochs", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "check_val_every_n_epoch", "val_check_interval", "limit_train_batches",
    "limit_val_batches",
)  # fmt: skip

_BY_TYPE = {"trainer.limit_train_batches", "trainer.limit_val_batches", "trainer.val_check_interval"}
"""Options for which 1 and 1.0 differ: a number of batches, or a fraction of them."""


def trainer_options(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the Trainer's options that decide what is trained and when it is evaluated, by name."""
    # Lightning's Trainer has no val_check_interval if it was given as a time.
    return {f"trainer.{name}": getattr(trainer, name, None) for name in _OF_THE_TRAINER}


def comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that can be compared between ranks by value: no functions, tensors or objects."""
    return {name: value for name, value in options.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return value is None or isinstance(value, (bool, int, float, str))


def _key(value: Any, *, exactly: bool = False) -> str:
    """Return the same string for equal values, including NaN; a list equals a tuple."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_key, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_key(name)}: {_key(each)}' for name, each in value.items()))}}}"
    whole = isinstance(value, float) and value.is_integer() and not exactly
    return repr(int(value) if whole else value)


def require_same(everyones: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options that differ, such as one from an environment variable that only some nodes have.

    Args:
        everyones: Each rank's options by name; an option that a rank lacks is not compared there.

    Raises:
        ConfigurationError: If there is one; the message names the first, and each value with the ranks that have it.
    """
    for name in dict.fromkeys(name for options in everyones for name in options):
        ranks: dict[str, list[int]] = {}
        for rank, options in enumerate(everyones):
            if name in options:
                ranks.setdefault(_key(options[name], exactly=name in _BY_TYPE), []).append(rank)
        if len(ranks) > 1:
            told = ", ".join(f"{value} on {_numbered(which)}" for value, which in ranks.items())
            raise ConfigurationError(
                f"{name} is not the same on all ranks: {told}; start all processes with the same options and "
                "environment."
            )


def _numbered(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:4]))}{more}"
