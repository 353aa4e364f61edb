"""Small models with everything that a pipeline can get wrong, trained by the strategy and by a plain torch loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError

WIDTH, CLASSES, VAL_INTERVAL = 8, 5, 5
Batch = tuple[Any, Any]


class Catchable(PipeLiteStrategy):
    """An error that all ranks raise at once can be caught; otherwise the watchdog ends the processes."""

    def on_exception(self, exception: BaseException) -> None:
        pass


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.float(), targets)


def token_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    total = nn.functional.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten(), reduction="sum")
    return total, (targets != -100).sum()


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Any) -> Any:
        return self.function(inputs)


class OnFirst(nn.Module):
    """Applies a module to the first of a tuple, and hands the others on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.inner(inputs[0]), *inputs[1:]


class TiedEmbedding(nn.Module):
    """An embedding of integers, and the head on hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T if inputs.is_floating_point() else self.weight[inputs]


class Lora(nn.Module):
    """A frozen bf16 weight with fp32 adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.b(self.a(inputs.float())).to(inputs.dtype)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


@dataclass
class Model:
    """Layers, their loss and their micro-batches."""

    layers: list[nn.Module]
    batches: list[Batch]
    loss: Any = mean_loss
    clip: float | None = None
    algorithm: str | None = None
    accumulate: int = 4
    replicas: tuple[int, ...] = (1,)
    stages: tuple[int, ...] = (2,)


def linears(count: int) -> list[nn.Module]:
    return [
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count - 1)),
        nn.Linear(WIDTH, CLASSES),
    ]


def floats(number: int = 10, rows: int = 3) -> list[Batch]:
    return [(torch.randn(rows, WIDTH), torch.randint(CLASSES, (rows,))) for _ in range(number)]


def tokens(number: int, embedded: bool = False) -> list[Batch]:
    """Sequences with unequal numbers of masked targets, one of them wholly masked."""
    made: list[Batch] = []
    for index in range(number):
        targets = torch.randint(CLASSES, (2, 6))
        targets[:, : (index * 5) % 6] = -100
        if index == 5:
            targets[:] = -100
        made.append((torch.randint(CLASSES, (2, 6)) if embedded else torch.randn(2, 6, WIDTH), targets))
    return made


def frozen(layers: list[nn.Module], which: list[int]) -> list[nn.Module]:
    for index in which:
        layers[index].requires_grad_(False)
    return layers


def tied_parameter() -> list[nn.Module]:
    embedding, head = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
    head.weight = embedding.weight
    return [embedding, *linears(3)[:2], head]


def tied_inside() -> list[nn.Module]:
    """The same module inside of two others."""
    shared = nn.Linear(WIDTH, WIDTH)
    return [nn.Sequential(shared, nn.Tanh()), nn.Tanh(), nn.Sequential(shared, nn.GELU()), nn.Linear(WIDTH, CLASSES)]


def tied_module(trained: bool = True) -> list[nn.Module]:
    embedding = TiedEmbedding().requires_grad_(trained)
    return [embedding, *linears(3)[:2], embedding]


def unused_float_side() -> Model:
    layers = [OnFirst(layer) for layer in linears(4)]
    batches = [((x, torch.ones(3, 2), torch.arange(3)), y) for x, y in floats()]
    return Model([*layers, Lambda(lambda item: item[0])], batches, stages=(3,))


def used_side() -> Model:
    """A float side tensor (weights) that the last stage uses, and an integer one."""

    def weigh(item: tuple[Tensor, ...]) -> Tensor:
        return item[0] * item[1].sum(1, keepdim=True) + nn.functional.one_hot(item[2], CLASSES)

    layers = [OnFirst(layer) for layer in linears(4)]
    batches = [((x, torch.rand(3, 2), torch.tensor([4, 0, 2])), y) for x, y in floats()]
    return Model([*layers, Lambda(weigh)], batches, stages=(3,))


def mixed_dtypes() -> Model:
    bf16 = torch.bfloat16
    layers = [Lambda(lambda x: x.to(bf16)), Lora(), Lora(), Lambda(lambda x: x.float()), *linears(2)]
    return Model(layers, floats(), stages=(3,))


def other_shapes() -> Model:
    batches = list(itertools.chain(floats(4, 3), floats(2, 2), floats(4, 4)))
    return Model(linears(4), batches, stages=(2, 4))


def dictionaries() -> Model:
    """Inputs that change their length, which the targets do not show."""
    lengths = [6] * 4 + [2] * 3 + [9] * 2
    batches = [({"x": torch.randn(3, length, WIDTH)}, torch.randint(CLASSES, (3,))) for length in lengths]
    return Model([Lambda(lambda item: item["x"]), *linears(3), Lambda(lambda x: x.mean(1))], batches)


def turned() -> Model:
    """Stages that end with tensors which are not contiguous."""
    turn = Lambda(lambda x: x.transpose(0, 1))
    return Model([nn.Linear(WIDTH, WIDTH), turn, Lambda(lambda x: x.transpose(0, 1)), *linears(1)], floats())


MODELS: dict[str, Callable[[], Model]] = {
    "mean": lambda: Model(linears(4), floats(), clip=0.05, replicas=(1, 2), stages=(1, 2)),
    "tokens": lambda: Model(linears(4), tokens(18), token_loss, clip=0.1, replicas=(1, 2), stages=(1, 2)),
    "clip by value": lambda: Model(linears(4), floats(), clip=0.01, algorithm="value", stages=(2, 4)),
    "short window of one": lambda: Model(linears(4), tokens(9), token_loss, stages=(1, 2)),
    "no accumulation": lambda: Model(linears(4), tokens(5), token_loss, accumulate=1),
    "frozen first": lambda: Model(frozen(linears(4), [0, 1]), floats(), clip=0.05),
    "frozen middle": lambda: Model(frozen(linears(4), [1, 2]), floats(), clip=0.05, stages=(4,)),
    "frozen last": lambda: Model(frozen(linears(4), [2, 3]), floats(), clip=0.05, replicas=(1, 2)),
    "tied module": lambda: Model(tied_module(), tokens(10, True), token_loss, clip=0.1, replicas=(1, 2), stages=(1, 2)),
    "tied module, four stages": lambda: Model(tied_module(), tokens(10, True), token_loss, clip=0.1, stages=(4,)),
    "tied parameter": lambda: Model(tied_parameter(), tokens(10, True), token_loss, clip=0.1, stages=(2, 4)),
    "tied inside of layers": lambda: Model(tied_inside(), floats(), clip=0.1, stages=(1, 2)),
    "tied and frozen": lambda: Model(tied_module(False), tokens(10, True), token_loss, clip=0.1, stages=(2,)),
    "scalar parameter": lambda: Model([Scale(), *linears(3)], floats(), clip=0.05, replicas=(2,)),
    "float side tensor without use": unused_float_side,
    "side tensors": used_side,
    "dtypes": mixed_dtypes,
    "shapes": other_shapes,
    "dictionaries": dictionaries,
    "turned": turned,
}


def tied_ends() -> list[nn.Module]:
    """The first and the last of eight layers, and two in the middle that have a stage in common."""
    embedding, shared, hidden = TiedEmbedding(), nn.Linear(WIDTH, WIDTH), linears(5)
    return [
        embedding,
        nn.Sequential(shared, nn.Tanh()),
        *hidden[:3],
        nn.Sequential(shared, nn.GELU()),
        hidden[3],
        embedding,
    ]


def deep_sides() -> Model:
    """Tensors of several types, which every piece hands on; micro-batches of three shapes."""
    lengths = [3] * 5 + [2] * 4 + [4]
    batches = [
        ((torch.randn(n, WIDTH), torch.rand(n, 2), torch.arange(n)), torch.randint(CLASSES, (n,))) for n in lengths
    ]
    return Model([*map(OnFirst, linears(7)), Lambda(lambda item: item[0] * item[1].sum(1, keepdim=True))], batches)


# Of eight layers, for several pieces on each stage; the last step of an epoch has fewer micro-batches than ranks.
DEEP: dict[str, Callable[[], Model]] = {
    "eight layers": lambda: Model(linears(8), tokens(18), token_loss, clip=0.1, accumulate=4),
    "tied ends": lambda: Model(tied_ends(), tokens(10, True), token_loss, clip=0.1),
    "frozen pieces": lambda: Model(frozen(linears(8), [0, 1, 4, 5, 7]), floats(9), clip=0.01, algorithm="value"),
    "deep sides": deep_sides,
    "one micro-batch": lambda: Model(linears(8), tokens(5), token_loss, accumulate=1),
}


def build(name: str) -> Model:
    torch.manual_seed(3)
    return {**MODELS, **DEEP}[name]()


class Module(L.LightningModule):
    """Any layers as a LightningModule."""

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
    """Notes the loss and the gradient norm of each step."""

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
    # Where Lightning deals out the rows to several processes, it shuffles them whatever the loader says.
    defaults = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return L.Trainer(strategy=strategy, accelerator="cpu", devices=processes, **{**defaults, **options})


def collected(strategy: PipeLiteStrategy) -> dict[str, Tensor]:
    """All parameters of all stages, on rank 0; a tied one must be equal to the bit in all of them."""
    assert strategy.stage is not None
    found: dict[str, Tensor] = {}
    mine = {name: p.detach().clone() for name, p in strategy.stage.named_parameters()}
    for stage in strategy.collect_stages(mine):
        for name, tensor in stage.items():
            assert name not in found or torch.equal(found[name], tensor), f"{name} differs between stages"
            found[name] = tensor
    return found


def train(name: str, stages: int, replicas: int, virtual_stages: int = 1) -> dict[str, Any]:
    """Two epochs under the strategy, with evaluations in the middle of a window."""
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
    """The same in plain torch, on the whole model."""
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
    """Parameters by the names that stages give them: that of the first layer, or a number if several layers have it."""
    holders = {
        p: sum(any(p is own for own in layer.parameters()) for layer in layers.children()) for p in layers.parameters()
    }
    shared = [p for p, count in holders.items() if count > 1]
    names = {p: name for name, p in layers.named_parameters()} | {p: f"shared_{i}" for i, p in enumerate(shared)}
    return {name: parameter.detach() for parameter, name in names.items()}


def hand_on(kind: str) -> str:
    """What the engine says to the outputs of a stage, for two micro-batches of equal shapes."""
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
