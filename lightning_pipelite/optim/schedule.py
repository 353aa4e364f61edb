"""Learning-rate schedules."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rms_ratio(step: int, beta2: float) -> float:
    """The factor sqrt((1 - β₂ᵗ) / (1 + β₂ᵗ)) of step t, counted from 1.

    It is the ratio by which the root mean square of Adam's second-moment average of t uncorrelated gradients falls
    short of its value in the long run: steps start small while the average rests on few gradients, and grow to the
    full learning rate by themselves, with no warm-up to choose.
    """
    decayed = beta2**step
    return ((1 - decayed) / (1 + decayed)) ** 0.5


def rms_ratio_schedule(optimizer: Optimizer, beta2: float) -> LambdaLR:
    """lr · sqrt((1 - β₂ᵗ) / (1 + β₂ᵗ)) in step t, see :func:`rms_ratio`; to be stepped once an optimizer step.

    Raises:
        ValueError: if not 0 < beta2 < 1.
    """
    if not 0 < beta2 < 1:
        raise ValueError(f"beta2 must lie between 0 and 1, not {beta2}.")
    return LambdaLR(optimizer, lambda epoch: rms_ratio(epoch + 1, beta2))
