"""Callbacks for any Lightning project."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.callbacks.adapter_norms import AdapterNorms
    from lightning_pipelite.callbacks.composite_weight_decay import CompositeWeightDecay
    from lightning_pipelite.callbacks.eval_schedule import EvalSchedule
    from lightning_pipelite.callbacks.samples import Samples
    from lightning_pipelite.callbacks.save_trained import SaveTrained
    from lightning_pipelite.callbacks.stage_times import StageTimes
    from lightning_pipelite.callbacks.step_progress import StepProgress
    from lightning_pipelite.callbacks.timed_checkpoint import TimedCheckpoint

__all__ = [
    "AdapterNorms",
    "CompositeWeightDecay",
    "EvalSchedule",
    "Samples",
    "SaveTrained",
    "StageTimes",
    "StepProgress",
    "TimedCheckpoint",
]
__getattr__ = lazy_names(
    __name__,
    {
        "AdapterNorms": "adapter_norms",
        "CompositeWeightDecay": "composite_weight_decay",
        "EvalSchedule": "eval_schedule",
        "Samples": "samples",
        "SaveTrained": "save_trained",
        "StageTimes": "stage_times",
        "StepProgress": "step_progress",
        "TimedCheckpoint": "timed_checkpoint",
    },
)
