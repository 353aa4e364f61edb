"""Handles low-rank products W = s·B·A through rank x rank matrices, many layers at a time, without forming W."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_pipelite.errors import ConfigurationError

CHUNK_BYTES = 36 * 2**20
"""Maximum size of the stacked A and B: enough that the GPU, not the host's kernel launches, is the bottleneck."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The adapter s·B·A of one module.

    Args:
        name: The module's name.
        a: [rank, in], or [experts · rank, in] for the fused experts of one layer.
        b: [out, rank], or [out, rank · experts].
        scale: The factor s: PEFT's alpha / rank, or what its variants use instead.
        experts: Number of products that A and B hold, in PEFT's layout.
    """

    name: str
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    experts: int = 1


@dataclass(eq=False)
class Chunk:
    """Pairs of equal shapes, dtypes, device and scale, handled in one batch.

    Views are created once: for hundreds of modules, creating them takes longer than the arithmetic.

    Args:
        pairs: At least one.
    """

    pairs: Sequence[LowRank]
    downs: list[Tensor] = field(init=False)
    ups: list[Tensor] = field(init=False)
    _downs_to_stack: list[Tensor] = field(init=False)
    _pointers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.downs = [a for pair in self.pairs for a in _down(pair).unbind()]
        self.ups = [b for pair in self.pairs for b in _up(pair).unbind()]
        self._downs_to_stack = [a.unsqueeze(1) for a in self.downs]
        self._pointers = self._where()

    def _where(self) -> list[int]:
        return [weight.data_ptr() for pair in self.pairs for weight in (pair.a, pair.b)]

    def refresh(self) -> None:
        """Recreate the views if the memory of a parameter has changed."""
        if self._where() != self._pointers:
            self.__post_init__()

    @property
    def scale(self) -> float:
        """The factor of B·A, the same for all pairs."""
        return self.pairs[0].scale

    def stack(self) -> tuple[Tensor, Tensor]:
        """Return copies of A and B in float32.

        A is [pairs · experts, rank, in], a view of [rank, pairs · experts, in]; B is [pairs · experts, out, rank].
        """
        a, b = torch.cat(self._downs_to_stack, dim=1), torch.cat(self.ups)
        return a.float().transpose(0, 1), b.float().view(len(self.ups), -1, b.shape[1])

    @staticmethod
    def write(views: list[Tensor], values: Tensor) -> None:
        """Write ``values``, [pairs · experts, rows, columns], to ``views`` of A or B in one operation."""
        rows = values.shape[1]
        if values.dtype == views[0].dtype and all(view.is_contiguous() for view in views):
            torch.split_with_sizes_copy(values.flatten(0, 1), [rows] * len(views), out=views)
        else:
            torch._foreach_copy_(views, list(values.unbind()))

    def norms(self, gram_a: Tensor, gram_b: Tensor) -> Tensor:
        """Return ‖s B A‖_F of each pair (of all its experts together), [pairs] in float64.

        ‖BA‖²_F = tr(Aᵀ Bᵀ B A) = tr(G_B G_A), the sum over the elementwise product of two symmetric matrices. It is
        summed in float64, so that the difference of two norms stays precise.
        """
        traces = (gram_a.double() * gram_b.double()).sum((-2, -1))
        return self.scale * traces.view(len(self.pairs), -1).sum(1).clamp(min=0).sqrt()


def _down(pair: LowRank) -> Tensor:
    """Return A as a view [experts, rank, in]."""
    return pair.a.detach().view(pair.experts, -1, pair.a.shape[1])


def _up(pair: LowRank) -> Tensor:
    """Return B as a view [experts, out, rank]."""
    return pair.b.detach().view(pair.b.shape[0], -1, pair.experts).permute(2, 0, 1)


# Variants of PEFT's LoRA in which B·A means the same as without them. Others multiply it by something else.
_PLAIN_VARIANTS = re.compile("Dora|ALora|MiCA")


def find_low_rank(module: nn.Module) -> list[LowRank]:
    """Find PEFT's LoRA layers in a module: linear ones, embeddings and fused experts; for DoRA, only B·A.

    If a layer has several adapters, each is listed separately, with the adapter in its name.

    Raises:
        ConfigurationError: A LoRA layer is of another kind, or its weights are sharded.
    """
    from peft.tuners.lora import LoraLayer

    found = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weights = {each: (layer.lora_A[each].weight, layer.lora_B[each].weight) for each in layer.lora_A}
        weights |= {
            each: (layer.lora_embedding_A[each], layer.lora_embedding_B[each]) for each in layer.lora_embedding_A
        }
        for adapter, (a, b) in weights.items():
            variant = type(layer.lora_variant.get(adapter)).__name__
            if adapter in layer.lora_variant and not _PLAIN_VARIANTS.match(variant):
                raise ConfigurationError(
                    f"the adapter of {name} is a {variant.removesuffix('Variant')}, which is more than the product B·A "
                    "that AdapterNorms and CompositeWeightDecay support; leave these callbacks out."
                )
            if any(w.ndim != 2 or isinstance(w, DTensor) for w in (a, b)) or a.shape[0] != b.shape[1]:
                raise ConfigurationError(
                    f"the LoRA weights of {name} have shapes {list(a.shape)} and {list(b.shape)}, but norms and decay "
                    "need plain, unsharded matrices; use a strategy that does not shard them, and adapt only "
                    "linear layers."
                )
            experts = getattr(layer, "num_experts", 1)
            parameter = [layer.parameter_name] if hasattr(layer, "parameter_name") else []
            full = ".".join([name.replace(".base_layer", ""), *parameter])
            which = f" ({adapter})" if len(weights) > 1 else ""
            found.append(LowRank(full + which, a, b, float(layer.scaling[adapter]), experts))
    return found


def chunks(pairs: Iterable[LowRank], key: Callable[[LowRank], Hashable] = lambda pair: None) -> list[Chunk]:
    """Group pairs of equal shape, dtype, device, scale and ``key`` into chunks of at most CHUNK_BYTES."""
    alike: dict[Hashable, list[LowRank]] = {}
    for pair in pairs:
        kind = (pair.a.shape, pair.b.shape, pair.experts, pair.a.dtype, pair.b.dtype, pair.a.device, pair.scale)
        alike.setdefault((kind, key(pair)), []).append(pair)
    made = []
    for same in alike.values():
        size = 4 * (same[0].a.numel() + same[0].b.numel())
        step = max(1, CHUNK_BYTES // size)
        made += [Chunk(same[start : start + step]) for start in range(0, len(same), step)]
    return made


def gram_matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return G_A = A Aᵀ and G_B = Bᵀ B, each [pairs · experts, rank, rank], from the result of :meth:`Chunk.stack`.

    The long dimension is summed in slices: otherwise a GPU would assign each pair to a single one of its many
    multiprocessors, which would loop over thousands of columns alone.
    """
    pairs, rank, inner = a.shape
    slices = _slices(inner)
    parts = a.transpose(0, 1).reshape(rank, pairs * slices, inner // slices).transpose(0, 1)  # no copy
    gram_a = torch.bmm(parts, parts.mT).view(pairs, slices, rank, rank).sum(1)
    slices = _slices(b.shape[1])
    parts = b.reshape(pairs * slices, b.shape[1] // slices, rank)
    return gram_a, torch.bmm(parts.mT, parts).view(pairs, slices, rank, rank).sum(1)


def _slices(length: int) -> int:
    """Return the number of equal slices of 256 to 512 to cut ``length`` into, as far as halving allows."""
    slices = 1
    while length > 512 and length % 2 == 0:
        length, slices = length // 2, 2 * slices
    return slices
