"""A training that is resumed with different options, and the same in plain torch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from stage_jobs import Catchable, Module, collected, trainer_for
from stage_models import Model, floats, linears, mean_loss

BEFORE, AFTER = 3, 3


def _warm_up(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps)


class Rise:
    """A schedule function with options."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return _warm_up(step, self.steps)


SCHEDULES: dict[str, Callable[..., Any]] = {
    "none": lambda optimizer: None,
    "warm-up": lambda optimizer, steps=8: lr_scheduler.LambdaLR(optimizer, partial(_warm_up, steps=steps)),
    "object": lambda optimizer, steps=8: lr_scheduler.LambdaLR(optimizer, Rise(steps)),
    "steps": lambda optimizer, gamma=0.5: lr_scheduler.StepLR(optimizer, 2, gamma),
    "cosine": lambda optimizer, total=9: lr_scheduler.CosineAnnealingLR(optimizer, total),
    "cycle": lambda optimizer, max_lr=0.05: lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=12),
    "two": lambda optimizer, steps=8: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LambdaLR(optimizer, partial(_warm_up, steps=steps)), lr_scheduler.StepLR(optimizer, 2, 0.5)],
        milestones=[2],
    ),
}


class Optimized(Module):
    """Has two parameter groups, of which only the last stage has the second."""

    def __init__(self, options: dict[str, Any], schedule: str, schedule_options: dict[str, Any]) -> None:
        torch.manual_seed(2)
        super().__init__(Model(linears(4), floats(8), mean_loss))
        self.options, self.schedule, self.schedule_options = options, schedule, schedule_options

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = optimize(self.layers, self.options, self.schedule, self.schedule_options)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def optimize(layers: nn.ModuleList, options: dict[str, Any], schedule: str, more: dict[str, Any]) -> tuple[Any, Any]:
    groups = [{"params": layers[:3].parameters()}, {"params": layers[3:].parameters(), "eps": 1e-6}]
    optimizer = torch.optim.AdamW(groups, **{"lr": 0.02, "weight_decay": 0.1, **options})
    return optimizer, SCHEDULES[schedule](optimizer, **more)


def resumed(folder: str, stages: int, first: tuple[Any, ...], second: tuple[Any, ...]) -> dict[str, Any]:
    """Train some steps with the first options, save, and resume for some more with the second."""
    path, told = f"{folder}/a.ckpt", io.StringIO()
    for number, (given, steps) in enumerate(((first, BEFORE), (second, BEFORE + AFTER))):
        strategy, module = Catchable(stages), Optimized(*given)
        trainer = trainer_for(strategy, stages, max_steps=steps, max_epochs=-1)
        with contextlib.redirect_stdout(told):
            trainer.fit(module, DataLoader(module.model.batches, batch_size=None), ckpt_path=path if number else None)
        if not number:
            trainer.save_checkpoint(path)
    group = {key: value for key, value in trainer.optimizers[0].param_groups[0].items() if key != "params"}
    return {"weights": collected(strategy), "told": told.getvalue(), "group": group}


def in_plain_torch(first: tuple[Any, ...], second: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """Train the same: the second options start from scratch, apart from the weights and moments, which are kept."""
    module = Optimized(*first)
    layers, batches = module.layers, module.model.batches
    state: Any = None
    for given, steps in ((first, BEFORE), (second, AFTER)):  # the loader starts over, as it has no state
        optimizer, scheduler = optimize(layers, *given)
        if state is not None:
            moments = optimizer.state_dict()
            optimizer.load_state_dict({**moments, "state": state})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(BEFORE if scheduler is not None else 0):
                    scheduler.step()
        for hidden, targets in batches[:steps]:
            for layer in layers:
                hidden = layer(hidden)
            mean_loss(hidden, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        state = optimizer.state_dict()["state"]
    return {name.removeprefix("layers."): p.detach() for name, p in layers.named_parameters()}
