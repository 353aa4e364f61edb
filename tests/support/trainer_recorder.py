"""Records everything that a Trainer does to a module, its callbacks, its logger and its folder, as plain values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lightning_pipelite import PipeLiteStrategy

Event = tuple[Any, ...]
OTHER_MODULE_HOOKS = (
    "configure_callbacks", "configure_gradient_clipping", "lr_scheduler_step", "optimizer_step",
    "optimizer_zero_grad", "prepare_data", "setup", "teardown", "transfer_batch_to_device",
)  # fmt: skip
MODULE_HOOKS = {name for name in dir(L.LightningModule) if name.startswith("on_") and name != "on_gpu"}
CALLBACK_HOOKS = {name for name in vars(L.Callback) if name.startswith("on_")} | {"setup", "teardown", "state_dict"}


class Recorder:
    """Records calls, and the position of the Trainer at each."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.trainer: L.Trainer | None = None

    def note(self, who: str, what: str, *told: Any) -> None:
        trainer, place = self.trainer, ()
        if trainer is not None:
            stage = trainer.state.stage
            place = trainer.current_epoch, trainer.global_step, trainer.fit_loop.batch_idx, stage and stage.value
        self.events.append((who, what, *place, *(value for value in told if isinstance(value, (int, str)))))


def _recorded(owner: type, name: str) -> Callable[..., Any]:
    inherited = getattr(owner, name)

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.recorder.note("module" if isinstance(self, nn.Module) else "callback", name, *args, *kwargs.values())
        return inherited(self, *args, **kwargs)

    hook.__signature__ = inspect.signature(inherited)  # type: ignore[attr-defined]
    return hook


RecordingCallback: Any = type(
    "RecordingCallback", (L.Callback,), {name: _recorded(L.Callback, name) for name in CALLBACK_HOOKS}
)
RecordingModule: Any = type(
    "RecordingModule",
    (L.LightningModule,),
    {name: _recorded(L.LightningModule, name) for name in {*MODULE_HOOKS, *OTHER_MODULE_HOOKS}},
)


class RecordingLogger(Logger):
    """Records the logged lines, and Lightning's other calls."""

    name, version = "recorded", 0

    def __init__(self, recorder: Recorder, folder: Path) -> None:
        super().__init__()
        self.recorder, self._folder = recorder, folder
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.recorder.note("logger", "log_metrics", *sorted(metrics))
        self.lines.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        self.recorder.note("logger", "log_hyperparams")

    def log_graph(self, *_: Any) -> None:
        self.recorder.note("logger", "log_graph")

    def save(self) -> None:
        self.recorder.note("logger", "save")

    def finalize(self, status: str) -> None:
        self.recorder.note("logger", "finalize", status)


class Net(RecordingModule):
    """Trains the same under any strategy.

    Under Lightning's own strategies, it does itself what the pipeline strategy is documented to do: the logged loss is
    the mean over a step's micro-batches, on all ranks; so are the gradients, even in a step that is cut short; and the
    norm of the gradients is logged.

    Args:
        recorder: Receives every hook.
        scheduler: Returns the result of ``configure_optimizers``, given an optimizer.
        skips: Batch in whose ``on_train_batch_start`` the rest of the epoch is skipped.
    """

    def __init__(self, recorder: Recorder, scheduler: Callable[[Any, Any], Any] | None = None, skips: int = -1) -> None:
        super().__init__()
        self.recorder, self.scheduler, self.skips = recorder, scheduler, skips
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.window: list[Tensor] = []

    @property
    def alone(self) -> bool:
        return not isinstance(self.trainer.strategy, PipeLiteStrategy)

    def pipeline_layers(self) -> Any:
        return list(self.net), nn.functional.cross_entropy

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.recorder.note("module", "on_train_batch_start", batch_idx)
        return -1 if batch_idx == self.skips else None

    def training_step(self, batch: Any) -> Tensor:
        self.recorder.note("module", "training_step")
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.window = []
        self.window.append(loss.detach())
        if not self.trainer.fit_loop._should_accumulate():
            self.log("train/loss", torch.stack(self.window).mean(), prog_bar=True, sync_dist=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.recorder.note("module", "validation_step")
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("eval/loss", loss, prog_bar=True, sync_dist=True, batch_size=1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.recorder.note("module", "on_before_optimizer_step")
        if self.alone:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            for gradient in gradients:
                gradient *= self.trainer.accumulate_grad_batches / len(self.window)
            self.log("train/grad_norm", torch.cat([g.flatten() for g in gradients]).norm(), batch_size=1)

    def configure_optimizers(self) -> Any:
        self.recorder.note("module", "configure_optimizers")
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)
        return optimizer if self.scheduler is None else self.scheduler(optimizer, self.trainer)


class Weights(L.Callback):
    """Records the trained weights that this process has at the end of training."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = pl_module.net.named_parameters()  # type: ignore[union-attr]
        self.found = {name: p.detach().clone() for name, p in named if not p.is_meta}


def plain(value: Any, folder: Path) -> Any:
    """Return a value as comparable numbers, strings and containers; paths are relative to ``folder``."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, dict):
        return {plain(key, folder): plain(each, folder) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each, folder) for each in value]
    if isinstance(value, (str, Path)):
        return str(value).replace(str(folder), "...")
    return value if value is None or isinstance(value, (bool, int, float)) else repr(value)


def files(folder: Path) -> list[str]:
    """List the files in a folder. A checkpoint may be a file or a folder."""
    found = []
    for path in folder.rglob("*"):
        place = path.relative_to(folder)
        within = any(part.endswith(".ckpt") for part in place.parts[:-1])
        if not within and (path.suffix == ".ckpt" or path.is_file()):
            found.append(str(place))
    return sorted(found)
