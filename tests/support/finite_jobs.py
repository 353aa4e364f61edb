"""Fits in which something other than the loss stops being finite, and what each rank raises."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from stage_jobs import Catchable, Module, loader, trainer_for
from stage_models import Model, floats, frozen, linears


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient * ctx.factor, None


class Spoiling(nn.Module):
    """Passes its inputs on; in training, multiplies the gradient of one of its calls by ``factor``."""

    def __init__(self, factor: float, at: int) -> None:
        super().__init__()
        self.factor, self.calls, self.at = factor, itertools.count(), at

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and next(self.calls) == self.at:
            return _Spoiled.apply(inputs, self.factor)  # type: ignore[no-untyped-call,no-any-return]
        return inputs


@dataclass(frozen=True)
class Case:
    """A fit of four layers whose third step (of two micro-batches) goes wrong after the second layer.

    Attributes:
        factor: Factor of the gradients there.
        clip: ``gradient_clip_val``.
        algorithm: ``gradient_clip_algorithm``.
        own_clipping: Factor by which the module's own clipping multiplies the gradients instead.
        infinite: Name of a parameter in whose gradient a callback sets an element to infinity.
        frozen: Layers that are not trained.
    """

    factor: float
    clip: float | None = None
    algorithm: str | None = None
    own_clipping: float | None = None
    infinite: str = ""
    frozen: tuple[int, ...] = ()


class Clipping(Module):
    """Has its own gradient clipping."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        factor = self.model.own_clipping if self.trainer.global_step == 2 else 1.0  # type: ignore[attr-defined]
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor


class Before(L.Callback):
    """Copies weights and optimizer state at the start of each step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.copy = state_of(trainer)


class Spoil(L.Callback):
    """Sets a gradient to infinity in the third step."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        mine = dict(trainer.strategy.stage.named_parameters())
        if trainer.global_step == 2 and self.parameter in mine:
            mine[self.parameter].grad.view(-1)[0] = torch.inf


def state_of(trainer: Any) -> list[Tensor]:
    """Return this rank's weights and optimizer state."""
    states = trainer.optimizers[0].state.values()
    kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*trainer.strategy.stage.parameters(), *kept)]


def spoil(cases: list[Case], stages: int, replicas: int) -> list[dict[str, Any]]:
    """Return what a rank raises in each case, and whether its weights and optimizer state are unchanged by the step."""
    told = []
    for case in cases:
        torch.manual_seed(2)
        one, two, three, four = frozen(linears(4), list(case.frozen))
        # A micro-batch of one replica spoils the gradients of all.
        at = 5 if replicas == 1 else 4
        model = Model([one, two, Spoiling(case.factor, at), three, four], floats(8 * replicas))
        model.own_clipping = case.own_clipping  # type: ignore[attr-defined]
        strategy, before = Catchable(stages), Before()
        trainer = trainer_for(
            strategy, stages * replicas, accumulate_grad_batches=2, max_epochs=1, gradient_clip_val=case.clip,
            gradient_clip_algorithm=case.algorithm, callbacks=[before, Spoil(case.infinite)],
        )  # fmt: skip
        module = Module(model) if case.own_clipping is None else Clipping(model)
        error = None
        try:
            trainer.fit(module, loader(model.batches, strategy))
        except RuntimeError as raised:
            error = str(raised)
        now = state_of(trainer)
        same = all(torch.equal(a, b) for a, b in zip(before.copy, now, strict=True))
        told.append({"error": error, "untouched": same, "step": trainer.global_step})
    return told


class Careless(torch.optim.SGD):
    """Its third step writes NaN into the state or the weights of the last stage, from finite gradients."""

    where = "weights"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.steps += 1
        mine = [p for group in self.param_groups for p in group["params"] if p.shape[0] == 5]  # the last layer's
        if self.steps == 3 and mine:
            with torch.no_grad():
                (mine[0] if self.where == "weights" else self.state[mine[0]]["momentum_buffer"])[0] = torch.nan
        return result


def save_not_finite(where: str, folder: str, stages: int) -> tuple[str, list[str]]:
    """Return the error of a checkpoint after the third and last step, and the files that exist."""
    Careless.where = where
    torch.manual_seed(2)

    class OwnOptimizer(Module):
        def configure_optimizers(self) -> Any:
            return Careless(self.parameters(), lr=0.1, momentum=0.9)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > 1:
                trainer.save_checkpoint(f"{folder}/{trainer.global_step}.ckpt")

    batches = floats(3)
    strategy = Catchable(stages)
    trainer = trainer_for(strategy, stages, max_epochs=1, callbacks=[Save()])
    error = ""
    try:
        trainer.fit(OwnOptimizer(Model(linears(4), batches)), loader(batches, strategy))
    except RuntimeError as raised:
        error = str(raised)
    return error, sorted(path.name for path in Path(folder).glob("*.ckpt"))


def save_lora_not_finite(model_dir: str, folder: str, stages: int) -> list[str]:
    """Set a weight of a LoRA to NaN; return the errors of save_trained, called alone and at the end of a training."""
    from exact_training import Scale, Sequences, sequences
    from lightning_pipelite import PipeLiteModule
    from lightning_pipelite.adapters import LoRA
    from lightning_pipelite.callbacks import SaveTrained

    class Spoil(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            for name, parameter in module.pipeline_stage.named_parameters():
                if "layers.1" in name and "lora_A" in name:
                    with torch.no_grad():
                        parameter.view(-1)[0] = torch.inf
                    break
            try:
                module.save_trained(Path(folder) / "by hand")
            except RuntimeError as error:
                errors.append(str(error))

    errors: list[str] = []
    strategy = Catchable(stages)
    trainer = trainer_for(strategy, stages, max_steps=1, callbacks=[Spoil(), SaveTrained(f"{folder}/adapter")])
    data = torch.utils.data.DataLoader(Sequences(sequences(Scale(sequences=4))), batch_size=1)
    try:
        trainer.fit(PipeLiteModule(model_dir, LoRA(rank=4), dtype="float32"), data)
    except RuntimeError as error:
        errors.append(str(error))
    return errors
