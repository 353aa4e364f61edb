"""Small models trained by the strategy and by a plain torch loop."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError
from stage_models import Batch, Model, build

VAL_INTERVAL = 5


class Catchable(PipeLiteStrategy):
    """Allows to catch an error that all ranks raise at once; otherwise, the watchdog ends the processes."""

    def on_exception(self, exception: BaseException) -> None:
        pass


class Module(L.LightningModule):
    """A LightningModule of any layers."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.layers)
        self.model = model

    def pipeline_layers(self) -> tuple[list[nn.Module], Any]:
        return self.model.layers, self.model.loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Steps(L.Callback):
    """Records the loss and the gradient norm of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seen = 0

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.seen < trainer.global_step:
            self.seen = trainer.global_step
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def loader(batches: list[Batch], strategy: PipeLiteStrategy) -> DataLoader[Any]:
    sampler = DistributedSampler(batches, **strategy.distributed_sampler_kwargs, shuffle=False)  # type: ignore[arg-type]
    return DataLoader(batches, batch_size=None, sampler=sampler)  # type: ignore[arg-type]


def trainer_for(strategy: Any, processes: int, **options: Any) -> L.Trainer:
    # When Lightning distributes the rows over several processes, it shuffles them whatever the loader says.
    defaults = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return L.Trainer(strategy=strategy, accelerator="cpu", devices=processes, **{**defaults, **options})


def collected(strategy: PipeLiteStrategy) -> dict[str, Tensor]:
    """Return all parameters of all stages on rank 0; a tied one must be bit-equal in all of them."""
    assert strategy.stage is not None
    found: dict[str, Tensor] = {}
    mine = {name: p.detach().clone() for name, p in strategy.stage.named_parameters()}
    for stage in strategy.collect_stages(mine):
        for name, tensor in stage.items():
            assert name not in found or torch.equal(found[name], tensor), f"{name} differs between stages"
            found[name] = tensor
    return found


def train(name: str, stages: int, replicas: int, virtual_stages: int = 1) -> dict[str, Any]:
    """Train two epochs under the strategy, with evaluations in the middle of an accumulation window."""
    model = build(name)
    steps, strategy = Steps(), PipeLiteStrategy(stages, virtual_stages=virtual_stages)
    trainer = trainer_for(
        strategy, stages * replicas, accumulate_grad_batches=model.accumulate, gradient_clip_val=model.clip,
        gradient_clip_algorithm=model.algorithm, max_epochs=2, callbacks=[steps], val_check_interval=VAL_INTERVAL,
    )  # fmt: skip
    trainer.fit(Module(model), loader(model.batches, strategy), loader(model.batches, strategy))
    return {
        "losses": steps.losses,
        "norms": steps.norms,
        "weights": collected(strategy),
        "eval": float(trainer.callback_metrics["eval/loss"]),
    }


def train_plainly(name: str, replicas: int) -> dict[str, Any]:
    """Train the same in plain torch, on the whole model."""
    model = build(name)
    whole = nn.ModuleList(model.layers)
    parameters = [p for p in whole.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)

    def terms(batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, targets = batch
        for layer in model.layers:
            hidden = layer(hidden)
        loss = model.loss(hidden, targets)
        return loss if isinstance(loss, tuple) else (loss, torch.ones(()))

    def mean(batches: list[Batch]) -> Tensor:
        totals, counts = zip(*(terms(batch) for batch in batches), strict=True)
        return sum(totals) / sum(counts)  # type: ignore[return-value]

    window = model.accumulate * replicas
    a_replica = len(model.batches) // replicas
    last_evaluated = a_replica // VAL_INTERVAL * VAL_INTERVAL
    losses, norms, evaluated = [], [], 0.0
    for start in [*range(0, len(model.batches), window)] * 2:
        loss = mean(model.batches[start : start + window])
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item())
        if model.algorithm == "value":
            nn.utils.clip_grad_value_(parameters, model.clip or 0.0)
        elif model.clip:
            nn.utils.clip_grad_norm_(parameters, model.clip)
        optimizer.step()
        optimizer.zero_grad()
        done = min(start // replicas + model.accumulate, a_replica)
        if done <= last_evaluated:
            with torch.no_grad():
                evaluated = mean(model.batches).item()
    return {"losses": losses, "norms": norms, "weights": named(whole), "eval": evaluated}


def named(layers: nn.ModuleList) -> dict[str, Tensor]:
    """Return parameters by their names in stages: their layer's, or ``shared_i`` if several layers have them."""
    holders = {
        p: sum(any(p is own for own in layer.parameters()) for layer in layers.children()) for p in layers.parameters()
    }
    shared = [p for p, count in holders.items() if count > 1]
    names = {p: name for name, p in layers.named_parameters()} | {p: f"shared_{i}" for i, p in enumerate(shared)}
    return {name: parameter.detach() for parameter, name in names.items()}


def hand_on(kind: str) -> str:
    """Return the engine's message about the outputs of a stage, for two micro-batches of equal shapes."""
    from lightning_pipelite.strategy.engine import PipeLiteEngine

    first = torch.ones(2, 3)
    second: Any = {
        "equal": torch.zeros(2, 3),
        "turned": torch.ones(3, 2).T,
        "other shapes": torch.ones(1, 3),
        "other dtypes": first.bfloat16(),
        "a dictionary": {"hidden": first},
    }[kind]
    engine: Any = object.__new__(PipeLiteEngine)
    engine.__dict__.update(stage_id=0, dynamic_shape=False, _sent=None)
    try:
        sent = [PipeLiteEngine._sendable(engine, outputs) for outputs in (first, second)]
    except (RuntimeError, ConfigurationError) as error:
        return f"{type(error).__name__}: {error}"
    return "handed on" if all(tensor.is_contiguous() for tensor in sent) else "not contiguous"
