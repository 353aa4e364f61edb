"""The same LightningModule under the strategy and under Lightning's own single-device one, and what each did."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.layers import SequentialLayers, build_stage
from stage_jobs import Catchable, Module, collected, loader, trainer_for
from stage_models import Model

ROWS = 4


class Mlp(L.LightningModule):
    """A module that trains the same under any strategy, and records its hooks."""

    def __init__(self, skip_odd_steps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.skip_odd_steps = skip_odd_steps
        self.hooks: list[str] = []
        self.gradients: list[tuple[str, float]] = []

    def pipeline_layers(self) -> Any:
        return list(self.net), nn.functional.cross_entropy

    def training_step(self, batch: Any) -> Tensor:  # without batch_idx, which Lightning then does not pass
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("eval/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _note(self, hook: str) -> None:
        self.hooks.append(hook)
        squares = [p.grad.square().sum() for p in self.parameters() if p.grad is not None]
        self.gradients.append((hook, float(sum(squares, torch.zeros(())))))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.hooks.append("on_before_zero_grad")

    def on_before_backward(self, loss: Tensor) -> None:
        self.hooks.append("on_before_backward")

    def on_after_backward(self) -> None:
        self.hooks.append("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._note("on_before_optimizer_step")

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self._note("before clipping")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._note("after clipping")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if self.skip_odd_steps and self.trainer.global_step % 2:
            optimizer_closure()
            self._note("skipped step")
        else:
            optimizer.step(closure=optimizer_closure)
            self._note("after step")


class Events(L.Callback):
    """Records events with their position in the training, and the metrics."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.events.append(("batch", trainer.current_epoch, batch_idx, trainer.global_step, rate))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.events.append(("validation", trainer.current_epoch, trainer.global_step, trainer.sanity_checking))
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
        if not trainer.sanity_checking:
            self.metrics.append(found)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.events.append(("epoch", trainer.current_epoch))


def data(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(rows, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def fit(options: dict[str, Any], stages: int | None, skip_odd_steps: bool = False, loaders: int = 1) -> dict[str, Any]:
    """Run one fit; ``stages`` of None is Lightning's own single-device strategy."""
    events = Events()
    strategy: Any = "auto" if stages is None else PipeLiteStrategy(stages)
    module = Mlp(skip_odd_steps)
    trainer = trainer_for(strategy, stages or 1, callbacks=[events], **options)
    evaluated = [DataLoader(data(20 + 8 * index), batch_size=ROWS) for index in range(loaders)]
    trainer.fit(module, DataLoader(data(40), batch_size=ROWS), evaluated if loaders > 1 else evaluated[0])
    weights = module.net.state_dict() if stages is None else collected(strategy)
    return {
        "events": events.events, "metrics": events.metrics, "weights": list(weights.values()), "hooks": module.hooks,
        "gradients": module.gradients,
    }  # fmt: skip


def fits(jobs: list[dict[str, Any]], stages: int) -> list[dict[str, Any]]:
    """Run several fits in one process."""
    return [fit(stages=stages, **job) for job in jobs]


def log_everything(folder: str, stages: int | None) -> dict[str, Any]:
    """Fit with both loggers, the learning rate monitor and each of the two progress bars."""
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    shown = {}
    for kind in (TQDMProgressBar, RichProgressBar):
        where = Path(folder) / kind.__name__
        bar, strategy = kind(), "auto" if stages is None else PipeLiteStrategy(stages)
        trainer = trainer_for(
            strategy, stages or 1, logger=[CSVLogger(where, "", "csv"), TensorBoardLogger(where, "", "tb")],
            callbacks=[bar, LearningRateMonitor("step")], enable_progress_bar=True, max_epochs=1, log_every_n_steps=1,
            accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(Mlp(), DataLoader(data(40), batch_size=ROWS), DataLoader(data(20), batch_size=ROWS))
        shown[kind.__name__] = sorted(trainer.progress_bar_metrics)
    return shown


def not_a_number(stages: int) -> dict[str, Any]:
    """Fit with a loss that is not finite in the third step."""
    torch.manual_seed(2)
    layers = [nn.Linear(6, 6), nn.Linear(6, 3)]
    batches = [(torch.randn(2, 6), torch.randint(3, (2,))) for _ in range(8)]
    batches[5] = (batches[5][0] * float("inf"), batches[5][1])
    strategy, before = Catchable(stages), []

    class Before(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert strategy.stage is not None
            before.append([p.detach().clone() for p in strategy.stage.parameters()])

    trainer = trainer_for(strategy, stages, accumulate_grad_batches=2, max_epochs=1, callbacks=[Before()])
    module = Module(Model(list(layers), batches))
    try:
        trainer.fit(module, loader(batches, strategy))
    except RuntimeError as error:
        assert strategy.stage is not None
        same = all(torch.equal(a, b) for a, b in zip(before[-1], strategy.stage.parameters(), strict=True))
        return {"error": str(error), "untouched": same, "step": trainer.global_step}
    return {}


def refusal(kind: str) -> str:
    """Return the error of a configuration or a module that the strategy cannot train, in one process."""
    layers: list[nn.Module] = [nn.Linear(6, 6), nn.Linear(6, 3)]
    batches = [(torch.randn(2, 6), torch.randint(3, (2,))) for _ in range(4)]
    module, options = Module(Model(layers, batches)), {"max_epochs": 1}
    strategy = Catchable(1)
    if kind == "stray parameter":
        module.temperature = nn.Parameter(torch.ones(1))
    elif kind == "unused parameter":
        layers[0].extra = nn.Parameter(torch.ones(1))
    elif kind == "sync_batchnorm":
        options["sync_batchnorm"] = True
    elif kind == "precision":
        options["precision"] = "bf16-mixed"
    elif kind == "lbfgs":
        module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    elif kind == "no optimizer":
        module.configure_optimizers = lambda: None
    elif kind == "frozen":
        module.requires_grad_(False)
    elif kind == "all masked":
        batches[0] = (batches[0][0], torch.full((2,), -100))
        module.model.loss = lambda o, t: (nn.functional.cross_entropy(o, t, reduction="sum"), (t != -100).sum())
    elif kind == "batch":
        batches[0] = {"x": 1}  # type: ignore[assignment]
    trainer = trainer_for(strategy, 1, **options)
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    several = CombinedLoader([loader, loader], "max_size_cycle")
    if kind == "two loaders, made a pair":
        module.on_after_batch_transfer = lambda batch, _: batch[0] if isinstance(batch[0], (tuple, list)) else batch
    try:
        if kind == "predict":
            trainer.predict(module, loader)
        elif kind == "two loaders in an evaluation":
            trainer.validate(module, several)
        else:
            trainer.fit(module, [loader, loader] if kind.startswith("two loaders") else loader)
    except (ConfigurationError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def late_layers(stages: int) -> float:
    """Train layers from `setup`, the first of which is unfrozen after an epoch; return how far that one has moved."""

    class Late(Mlp):
        def setup(self, stage: str) -> None:
            if not hasattr(self, "made"):
                self.made = list(self.net)
                self.net[0].requires_grad_(False)

        def pipeline_layers(self) -> Any:
            return self.made, nn.functional.cross_entropy

        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    module, strategy = Late(), PipeLiteStrategy(stages)
    first = module.net[0].weight.detach().clone()
    trainer_for(strategy, stages, max_epochs=2).fit(module, DataLoader(data(16), batch_size=ROWS))
    trained = collected(strategy)
    return float((trained["0.weight"] - first).abs().max()) if strategy.is_global_zero else 0.0


def split_again() -> str:
    """Split a module into other layers than in its first fit; return the error."""
    strategy = Catchable(1)
    module = Mlp()
    trainer_for(strategy, 1, max_epochs=1).fit(module, DataLoader(data(8), batch_size=ROWS))
    cpu = strategy.root_device
    build_stage(module, SequentialLayers([*module.net]), [(0, 5)], 5, cpu)
    try:
        build_stage(module, SequentialLayers([module.net]), [(0, 1)], 1, cpu)
    except ConfigurationError as error:
        return str(error)
    return "built"


def terminated(asks: int, name: str) -> tuple[int, str | None]:
    """Signal one rank in the second micro-batch of the third step; return the steps taken, and what ended the fit."""

    class Terminate(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 * 4 + 1 and trainer.global_rank == asks:
                os.kill(os.getpid(), getattr(signal, name))

    trainer = L.Trainer(
        strategy=Catchable(2), accelerator="cpu", devices=2, accumulate_grad_batches=4, max_steps=10,
        callbacks=[Terminate()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    ended_by = None
    try:
        trainer.fit(Mlp(), DataLoader(data(80), batch_size=2))
    except BaseException as error:
        ended_by = type(error).__name__
    return trainer.global_step, ended_by
