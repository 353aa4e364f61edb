"""The learning-rate schedule; the optimizers themselves are optimi's and torch's."""

from lightning_pipelite.optim.schedule import rms_ratio, rms_ratio_schedule

__all__ = ["rms_ratio", "rms_ratio_schedule"]
