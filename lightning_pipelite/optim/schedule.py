"""Learning-rate schedules."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_pipelite.errors import ConfigurationError


def rms_ratio(step: int, beta2: float) -> float:
    """Return the factor sqrt((1 - β₂ᵗ) / (1 + β₂ᵗ)) for step t, counted from 1.

    For uncorrelated gradients, this is the standard deviation of Adam's bias-corrected second-moment average in the
    long run, divided by that after t steps. Steps are small while the average rests on few gradients and grow to the
    full learning rate on their own, with no warm-up to choose.
    """
    decayed = beta2**step
    return ((1 - decayed) / (1 + decayed)) ** 0.5


def constant(step: int, warmup_steps: int) -> float:
    """Return the factor for step t, counted from 1: t / warmup_steps, then 1."""
    return min(1.0, step / max(1, warmup_steps))


def cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor for step t, counted from 1.

    ``t / warmup_steps``, then half a cosine period that would reach 0 one step after the last.

    Loshchilov and Hutter 2017, "SGDR" (https://arxiv.org/abs/1608.03983), without restarts.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def rms_ratio_schedule(optimizer: Optimizer, beta2: float) -> LambdaLR:
    """Return a schedule with lr · sqrt((1 - β₂ᵗ) / (1 + β₂ᵗ)) in step t; step it once per optimizer step.

    See :func:`rms_ratio`.

    Raises:
        ValueError: If not 0 < beta2 < 1.
    """
    if not 0 < beta2 < 1:
        raise ValueError(f"beta2 must lie between 0 and 1, not {beta2}.")
    return LambdaLR(optimizer, lambda epoch: rms_ratio(epoch + 1, beta2))


def rise_of(schedule: str, warmup_steps: int, beta2: float) -> tuple[int, int]:
    """Return the steps at which the rate has reached half, and the whole (nine tenths with ``rms_ratio``).

    Args:
        schedule: ``rms_ratio``, ``constant`` or ``cosine``.
        warmup_steps: Warm-up steps of ``constant`` and ``cosine``.
        beta2: The second beta, for ``rms_ratio``.
    """
    if schedule != "rms_ratio":
        return math.ceil(warmup_steps / 2), warmup_steps
    # factor² = (1 - β₂ᵗ) / (1 + β₂ᵗ), solved for t
    half, most = (math.ceil(math.log((1 - f * f) / (1 + f * f)) / math.log(beta2)) for f in (0.5, 0.9))
    return half, most


def make_schedule(optimizer: Optimizer, schedule: str, warmup_steps: int, total_steps: float) -> LambdaLR:
    """Return the schedule of that name; step it once per optimizer step.

    Args:
        optimizer: The optimizer, whose groups' learning rates are scaled; ``rms_ratio`` uses its second beta.
        schedule: ``rms_ratio``, ``constant`` or ``cosine``.
        warmup_steps: Steps of a linear rise from 0 to the full rate, for ``constant`` and ``cosine``.
        total_steps: Total training steps, for ``cosine``.

    Raises:
        ConfigurationError: If these are incompatible.
    """
    if schedule == "rms_ratio":
        beta2 = optimizer.defaults.get("beta2", (optimizer.defaults.get("betas") or (None,))[-1])  # optimi's, torch's
        if beta2 is None or not 0 < beta2 < 1:
            raise ConfigurationError(
                f"model.schedule is rms_ratio, but {type(optimizer).__name__} has no second beta between 0 and 1; set "
                "model.schedule to constant or cosine."
            )
        return rms_ratio_schedule(optimizer, beta2)
    if schedule == "constant":
        factor = partial(constant, warmup_steps=warmup_steps)
    else:
        if not warmup_steps < total_steps < math.inf:
            raise ConfigurationError(
                f"model.schedule is cosine with {warmup_steps} warmup_steps, but training has {total_steps:g} steps; "
                "set trainer.max_steps or max_epochs, or fewer warmup_steps."
            )
        factor = partial(cosine, warmup_steps=warmup_steps, total_steps=int(total_steps))
    return LambdaLR(optimizer, lambda epoch: factor(step=epoch + 1))
