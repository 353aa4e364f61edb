"""Learning-rate schedules and parameter groups; the optimizers themselves are optimi's and torch's."""

from lightning_pipelite.optim.groups import OptimizerFactory, check_patterns, group_parameters, make_optimizer
from lightning_pipelite.optim.schedule import check_schedule, make_schedule, rms_ratio, rms_ratio_schedule

__all__ = [
    "OptimizerFactory",
    "check_patterns",
    "check_schedule",
    "group_parameters",
    "make_optimizer",
    "make_schedule",
    "rms_ratio",
    "rms_ratio_schedule",
]
