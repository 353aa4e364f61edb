"""Optimizer groups that have no parameters on a stage: all remain visible, and the step skips the empty ones."""

from __future__ import annotations

from typing import Any

import lightning as L
import optimi
import pytest
import torch

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.strategy.empty_groups import EmptyGroups
from processes import Workers
from stage_jobs import Module, collected, loader, trainer_for
from stage_models import build


class Grouped(Module):
    """Has its first layer in a separate group; ``foreach``, the default on GPUs, updates many parameters at once."""

    foreach = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first, *others = self.model.layers
        groups = [
            {"params": [*first.parameters()], "lr": 0.01},
            {"params": [p for o in others for p in o.parameters()]},
        ]
        return optimi.Adam(groups, lr=0.02, foreach=self.foreach)


class Groups(L.Callback):
    """Records how many groups a callback sees at each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(len(trainer.optimizers[0].param_groups))


def train(stages: int, foreach: bool) -> dict[str, Any]:
    model = build("mean")
    module = Grouped(model)
    module.foreach = foreach
    strategy, groups = PipeLiteStrategy(stages), Groups()
    trainer = trainer_for(strategy, stages, accumulate_grad_batches=model.accumulate, max_epochs=1, callbacks=[groups])
    trainer.fit(module, loader(model.batches, strategy))
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    return {"weights": collected(strategy), "seen": groups.seen, "rates": rates}


@pytest.mark.parametrize("foreach", [True, False])
def test_each_stage_has_all_groups_and_steps_its_own(workers: Workers, foreach: bool) -> None:
    (one,) = workers.run(1, train, 1, foreach)
    both = workers.run(2, train, 2, foreach)
    for stage in both:
        assert set(stage["seen"]) == {2}
        assert stage["rates"] == [0.01, 0.02]
    torch.testing.assert_close(both[0]["weights"], one["weights"], atol=1e-6, rtol=0)


def test_what_others_hold_is_restored() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = optimi.Adam([{"params": []}, {"params": [parameter]}], lr=0.1, foreach=True)
    held, groups = optimizer.param_groups, [*optimizer.param_groups]
    empty = EmptyGroups(optimizer)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(len(optimizer.param_groups)))

    def closure() -> None:
        seen.append(len(optimizer.param_groups))
        parameter.grad = torch.ones(2)
        empty.hide()

    optimizer.step(closure)
    assert seen == [2, 2]
    assert optimizer.param_groups is held
    assert held == groups
    assert "step" not in groups[0]
    assert bool((parameter < 1).all())
