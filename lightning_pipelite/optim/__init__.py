"""Learning-rate schedules, parameter groups, and optimizer state offload; the optimizers are optimi's and torch's."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.optim.groups import OptimizerFactory, check_patterns, group_parameters, make_optimizer
    from lightning_pipelite.optim.offloaded import OffloadedOptimizer
    from lightning_pipelite.optim.ranges import check_schedule
    from lightning_pipelite.optim.schedule import make_schedule, rms_ratio, rms_ratio_schedule

__all__ = [
    "OffloadedOptimizer",
    "OptimizerFactory",
    "check_patterns",
    "check_schedule",
    "group_parameters",
    "make_optimizer",
    "make_schedule",
    "rms_ratio",
    "rms_ratio_schedule",
]
__getattr__ = lazy_names(
    __name__,
    {
        "OptimizerFactory": "groups",
        "check_patterns": "groups",
        "group_parameters": "groups",
        "make_optimizer": "groups",
        "OffloadedOptimizer": "offloaded",
        "check_schedule": "ranges",
        "make_schedule": "schedule",
        "rms_ratio": "schedule",
        "rms_ratio_schedule": "schedule",
    },
)
