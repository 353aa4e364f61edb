"""Callbacks for any Lightning project."""

from lightning_pipelite.callbacks.adapter_norms import AdapterNorms
from lightning_pipelite.callbacks.composite_weight_decay import CompositeWeightDecay
from lightning_pipelite.callbacks.eval_schedule import EvalSchedule
from lightning_pipelite.callbacks.save_trained import SaveTrained
from lightning_pipelite.callbacks.stage_times import StageTimes
from lightning_pipelite.callbacks.step_progress import StepProgress
from lightning_pipelite.callbacks.timed_checkpoint import TimedCheckpoint

__all__ = [
    "AdapterNorms",
    "CompositeWeightDecay",
    "EvalSchedule",
    "SaveTrained",
    "StageTimes",
    "StepProgress",
    "TimedCheckpoint",
]
