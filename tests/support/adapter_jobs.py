"""Trainings of adapters by the strategy, and the same by plain loops over the unsplit model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from optimi import Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from exact_training import Scale, Sequences, sequences
from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Adapter
from lightning_pipelite.callbacks import AdapterNorms, CompositeWeightDecay
from lightning_pipelite.data.sampler import PackedSampler

SCALE = Scale(sequence=32, sequences=24)
MICRO_BATCHES, LR, GAMMA, DECAY, STEPS = 4, 2e-2, 0.3, 4.0, 6


def items(scale: Scale = SCALE) -> list[dict[str, Tensor]]:
    """Return packed sequences, with control classes of all kinds wherever there is a label."""
    generator = torch.Generator().manual_seed(3)
    made = sequences(scale)
    for item in made:
        classes = torch.randint(-1, 2, (scale.sequence,), generator=generator)
        item["control_classes"] = classes * (item["labels"] != -100)
    return made


class Notes(L.Callback):
    """Records the initial adapters, and the metrics of each step."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.start = gathered(trainer.strategy, module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if len(self.steps) < trainer.global_step:
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def gathered(strategy: Any, module: PipeLiteModule) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in module.trained_state().items()}
    return {name: tensor for stage in strategy.collect_stages(state) for name, tensor in stage.items()}


def trainer_for(stages: int, replicas: int = 1, virtual_stages: int = 1, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": stages * replicas, "accumulate_grad_batches": MICRO_BATCHES // replicas,
        "max_steps": STEPS, "max_epochs": -1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return L.Trainer(strategy=PipeLiteStrategy(stages, virtual_stages=virtual_stages), **{**defaults, **options})


def loader(data: list[Any], strategy: Any) -> DataLoader[Any]:
    dataset = Sequences(data)
    sampler = PackedSampler(dataset, **strategy.distributed_sampler_kwargs, shuffle=False)
    return DataLoader(dataset, batch_size=1, sampler=sampler)


def train(
    model_dir: str,
    adapter: Adapter,
    stages: int,
    replicas: int,
    output: str,
    weight_decay: float,
    virtual_stages: int = 1,
    **options: Any,
) -> Any:
    """Train and save; return initial and final tensors by their names in the file, metrics, the final loss (rank 0)."""
    notes = Notes()
    callbacks = [CompositeWeightDecay(weight_decay), AdapterNorms(), notes]
    trainer = trainer_for(stages, replicas, virtual_stages, callbacks=callbacks)
    module = PipeLiteModule(model_dir, adapter, dtype="float32", lr=LR, **options)
    trainer.fit(module, loader(items(), trainer.strategy))
    module.save_trained(Path(output))
    final = gathered(trainer.strategy, module)
    loss = trainer.validate(module, loader(items(), trainer.strategy), verbose=False)[0]["eval/loss"]
    return (notes.start, final, notes.steps, loss) if trainer.is_global_zero else None


def first_step(model_dir: str, adapter: Adapter, stages: int, output: str) -> dict[str, float]:
    """Train for one step and save; return its metrics."""
    trainer = trainer_for(stages, max_steps=1)
    module = PipeLiteModule(model_dir, adapter, dtype="float32", lr=LR)
    trainer.fit(module, loader(items()[:MICRO_BATCHES], trainer.strategy))
    module.save_trained(Path(output))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def train_jobs(
    model_dir: str, jobs: list[tuple[Adapter, str, float, dict[str, Any]]], stages: int, virtual_stages: int = 1
) -> list[Any]:
    """Run several trainings in one process."""
    return [
        train(model_dir, adapter, stages, 1, output, decay, virtual_stages, **options)
        for adapter, output, decay, options in jobs
    ]


def resume(
    model_dir: str,
    adapter: Adapter,
    stages: int,
    checkpoint: str,
    epochs: int,
    resumes: bool,
    virtual_stages: int = 1,
) -> Any:
    """Train to the end of an epoch of three steps, from a checkpoint or from the start, and write one."""
    decay = CompositeWeightDecay(DECAY)
    trainer = trainer_for(stages, 1, virtual_stages, callbacks=[decay], max_steps=-1, max_epochs=epochs)
    module = PipeLiteModule(model_dir, adapter, dtype="float32", lr=LR)
    data = loader(items()[: 3 * MICRO_BATCHES], trainer.strategy)
    trainer.fit(module, data, ckpt_path=checkpoint if resumes else None)
    if not resumes:
        trainer.save_checkpoint(checkpoint)
    return gathered(trainer.strategy, module)


def train_control_plainly(model_dir: str, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """Train in a plain loop; hooks apply each class by its own matrix, and weight decay is naive."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train().requires_grad_(False)
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    batch: dict[str, Tensor] = {}

    def hook(number: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        q, s = (parameters[f"base_model.model.model.layers.{number}.control_{letter}"] for letter in "QS")
        for c in (-1, 1):
            matrix = q @ torch.diag(torch.exp(c * s) - 1) @ q.T
            chosen = (batch["control_classes"] == c)[..., None]
            output = output + torch.where(chosen, (batch["output"] - hidden) @ matrix.T, 0.0)
        return output

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        batch["output"] = output

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep)
        layer.register_forward_hook(partial(hook, number), with_kwargs=True)
    optimizer = Adam(list(parameters.values()), lr=LR, betas=(0.9, 0.99), eps=1e-6)
    data, losses = items(), []
    for step in range(STEPS):
        window = data[step * MICRO_BATCHES % len(data) :][:MICRO_BATCHES]
        count = sum(int((item["labels"] != -100).sum()) for item in window)
        total = 0.0
        for item in window:
            batch.update({name: tensor[None] for name, tensor in item.items()})
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits  # fmt: skip
            loss = nn.functional.cross_entropy(logits[0], item["labels"], reduction="sum") / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        decayed = 0.99 ** (step + 1)
        lr = LR * ((1 - decayed) / (1 + decayed)) ** 0.5
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name.endswith("Q"):
                    exact = parameter.double()
                    exact -= GAMMA * exact @ (exact.T @ exact - torch.eye(exact.shape[1], dtype=torch.float64))
                    parameter.copy_(exact)
                else:
                    parameter -= lr * DECAY * parameter
    return {name: parameter.detach() for name, parameter in parameters.items()}, losses


def evaluate_sets(model_dir: str, stages: int, adapter: Adapter) -> dict[str, float]:
    """Evaluate two named sets of unequal sizes; return the metrics."""
    trainer = trainer_for(stages, limit_train_batches=4, max_steps=1, val_check_interval=4)
    data = items()
    sets = {"short": loader(data[:5], trainer.strategy), "long": loader(data[5:16], trainer.strategy)}
    module = PipeLiteModule(model_dir, adapter, dtype="float32", lr=0.0)
    trainer.fit(module, loader(data, trainer.strategy), sets)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval")}


def learning_rates(model_dir: str, stages: int, adapter: Adapter, **options: Any) -> Any:
    """Return the rates of every group in each step, and the parameters of the groups on this rank."""
    rates: list[list[float]] = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer = trainer_for(stages, max_steps=-1, max_epochs=1, callbacks=[Rates()])
    module = PipeLiteModule(model_dir, adapter, dtype="float32", **options)
    trainer.fit(module, loader(items(), trainer.strategy))
    names = {id(p): name for name, p in module.named_parameters()}
    optimizer = trainer.optimizers[0]
    held = [sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups]
    return rates, held, type(optimizer).__name__


def refused(model_dir: str, **options: Any) -> str:
    """Return the error message of a fit that is refused."""
    from stage_jobs import Catchable

    trainer = L.Trainer(
        strategy=Catchable(1), accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    try:
        data = [{key: value for key, value in item.items() if key != "control_classes"} for item in items()]
        trainer.fit(PipeLiteModule(model_dir, **options), loader(data, trainer.strategy))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"
