"""Small models with everything that a pipeline can get wrong: layers, their loss and their micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 8, 5
Batch = tuple[Any, Any]


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
    """Applies a module to the first tensor of a tuple, and passes the others on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.inner(inputs[0]), *inputs[1:]


class TiedEmbedding(nn.Module):
    """An embedding for integers, and the head for hidden states."""

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
    """Return sequences with unequally many masked targets, one of them fully masked."""
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
    """Return layers, two of which contain the same module."""
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
    """Return a model with a float side tensor (weights) that the last stage uses, and an integer one."""

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
    """Return a model whose inputs change in length, which the targets do not show."""
    lengths = [6] * 4 + [2] * 3 + [9] * 2
    batches = [({"x": torch.randn(3, length, WIDTH)}, torch.randint(CLASSES, (3,))) for length in lengths]
    return Model([Lambda(lambda item: item["x"]), *linears(3), Lambda(lambda x: x.mean(1))], batches)


def turned() -> Model:
    """Return a model whose stages output non-contiguous tensors."""
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
    """Return eight layers: the first and the last are tied, and so are two in the middle that can share a stage."""
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
    """Return a model of side tensors of several dtypes, which every piece passes on; micro-batches of three shapes."""
    lengths = [3] * 5 + [2] * 4 + [4]
    batches = [
        ((torch.randn(n, WIDTH), torch.rand(n, 2), torch.arange(n)), torch.randint(CLASSES, (n,))) for n in lengths
    ]
    return Model([*map(OnFirst, linears(7)), Lambda(lambda item: item[0] * item[1].sum(1, keepdim=True))], batches)


# Models of eight layers, for several pieces a stage; an epoch's last step has fewer micro-batches than ranks.
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
