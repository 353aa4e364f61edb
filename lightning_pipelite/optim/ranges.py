"""Checks the options of optimizer and schedule; imports nothing slow."""

from __future__ import annotations

from lightning_pipelite.errors import ConfigurationError

BETAS, EPS = (0.9, 0.99), 1e-6
SCHEDULES = ("rms_ratio", "constant", "cosine")


def check_ranges(lr: float, betas: tuple[float, float], eps: float, *, of_default: bool) -> None:
    """Refuse values that are invalid for Adam, or implausible.

    Args:
        lr: The learning rate.
        betas: The betas of the default optimizer.
        eps: The epsilon of the default optimizer.
        of_default: Whether the default optimizer is used.

    Raises:
        ConfigurationError: If a value is out of range, or betas or eps are given for another optimizer.
    """
    for name, value, high in (("beta1", betas[0], 1), ("beta2", betas[1], 1), ("lr", lr, 1e3)):
        if not 0 <= value < high or (name == "beta2" and value == 0):
            raise ConfigurationError(f"model.{name} must be at least 0 and less than {high:g}, not {value}.")
    if eps <= 0:
        raise ConfigurationError(f"model.eps must be positive, not {eps}.")
    if not of_default and (betas, eps) != (BETAS, EPS):
        raise ConfigurationError(
            "model.beta1, beta2 and eps apply to the default optimizer; set them as options of model.optimizer."
        )


def check_schedule(schedule: str, warmup_steps: int) -> None:
    """Refuse an invalid schedule or warm-up, as far as known before training.

    Raises:
        ConfigurationError: If the schedule does not exist, or cannot have such a warm-up.
    """
    if schedule not in SCHEDULES:
        raise ConfigurationError(f"model.schedule is {schedule!r}; set it to one of {', '.join(SCHEDULES)}.")
    if warmup_steps < 0 or (warmup_steps and schedule == "rms_ratio"):
        raise ConfigurationError(
            f"model.warmup_steps is {warmup_steps} with schedule {schedule}; it must be 0 or more, and 0 with "
            "rms_ratio, which warms up on its own."
        )
