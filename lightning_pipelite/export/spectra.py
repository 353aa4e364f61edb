"""Measures adapters from their small factors; a product B·A is never formed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from lightning_pipelite.adapters.control_files import Transform
from lightning_pipelite.adapters.lora_kinds import check_tensors, read_lora_config, rest_of
from lightning_pipelite.adapters.peft_compat import expert_factors, rank_and_alpha
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.lora_files import Factors
from lightning_pipelite.models.transformers_compat import dot_natural_key


@dataclass(frozen=True)
class Product:
    """Figures of a matrix ΔW = scaling · B A, or of the stack of such matrices of fused experts.

    Attributes:
        singular_values: Singular values of ΔW, in descending order; for fused experts, their mean over the experts.
        frobenius: ‖ΔW‖_F; for fused experts, that of the stack.
        spectral: ‖ΔW‖₂; for fused experts, the largest.
        effective_rank: ‖ΔW‖²_* / ‖ΔW‖²_F, between 1 and the rank; for fused experts, their mean. 0 if ΔW is 0.
        relative: ‖ΔW‖_F / ‖W‖_F with W the base's weight; None without a base.
    """

    singular_values: list[float]
    frobenius: float
    spectral: float
    effective_rank: float
    relative: float | None


@dataclass(frozen=True)
class Control:
    """Figures of what a Control Adapter does to a decoder layer's delta: d becomes d + W d, W = Q diag(λ) Qᵀ.

    Attributes:
        orthogonality: ‖QᵀQ - I‖²_F; None if the file holds B and A instead of Q and S.
        eigenvalues: Eigenvalues of W for class +1, in descending order; without Q, their real parts.
        eigenvalues_inverse: The same for class -1.
        frobenius: ‖W‖_F.
        spectral: ‖W‖₂.
        nuclear: ‖W‖_*, the sum of the singular values.
        effective_rank: ‖W‖²_* / ‖W‖²_F, between 1 and the rank. 0 if W is 0.
        condition: Largest over smallest singular value among the first ``rank``; None if the smallest is 0.
        spectral_approximated: Max |λ|, which is ‖W‖₂ if Q is orthogonal; None without Q.
        spectral_error: (approximated - true) / true.
        nuclear_approximated: Σ |λ|, which is ‖W‖_* if Q is orthogonal; None without Q.
        nuclear_error: (approximated - true) / true.
    """

    orthogonality: float | None
    eigenvalues: list[float]
    eigenvalues_inverse: list[float]
    frobenius: float
    spectral: float
    nuclear: float
    effective_rank: float
    condition: float | None
    spectral_approximated: float | None
    spectral_error: float | None
    nuclear_approximated: float | None
    nuclear_error: float | None


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Return the singular values of B A, float64 [..., rank], from the QR decompositions of B and Aᵀ.

    With B = U R and Aᵀ = V T, B A = U (R Tᵀ) Vᵀ, so they are those of the rank x rank matrix R Tᵀ.

    Args:
        b: [..., out, rank].
        a: [..., rank, in].
    """
    r = torch.linalg.qr(b.double(), mode="r")[1]
    t = torch.linalg.qr(a.double().mT, mode="r")[1]
    return torch.linalg.svdvals(r @ t.mT)


def product(factors: Factors, base_norm: float | None = None) -> Product:
    """Return the figures of what a LoRA adds to a weight whose own Frobenius norm is ``base_norm``."""
    values = abs(factors.scaling) * singular_values(factors.b, factors.a)
    frobenius = float(values.norm())
    ranks = _effective_rank(values)
    return Product(
        singular_values=(values.mean(0) if values.ndim == 2 else values).tolist(),
        frobenius=frobenius,
        spectral=float(values.max()),
        effective_rank=float(ranks.mean()),
        relative=None if base_norm is None else frobenius / base_norm if base_norm else math.inf,
    )


def control(transform: Transform) -> Control:
    """Return the figures of a Control Adapter on one layer."""
    left, right = (each.double() for each in transform.factors())
    values = singular_values(left, right)
    spectral, nuclear, frobenius = float(values[0]), float(values.sum()), float(values.norm())
    orthogonality: float | None = None
    approximated: tuple[float | None, float | None] = (None, None)
    if transform.log_scales is not None:
        q = transform.left.double()
        orthogonality = float((q.mT @ q - torch.eye(q.shape[1])).square().sum())
        scales = torch.expm1(transform.log_scales.double()).abs()
        approximated = float(scales.max()), float(scales.sum())
    return Control(
        orthogonality=orthogonality,
        eigenvalues=_eigenvalues(transform, inverse=False),
        eigenvalues_inverse=_eigenvalues(transform, inverse=True),
        frobenius=frobenius,
        spectral=spectral,
        nuclear=nuclear,
        effective_rank=float(_effective_rank(values)),
        condition=spectral / float(values[-1]) if values[-1] > 0 else None,
        spectral_approximated=approximated[0],
        spectral_error=_error(approximated[0], spectral),
        nuclear_approximated=approximated[1],
        nuclear_error=_error(approximated[1], nuclear),
    )


def saved_factors(directory: Path) -> tuple[dict[str, Factors], list[str]]:
    """Return the factors of each product of a saved LoRA by name, from its directory alone, and what else it contains.

    Fused experts go by the name of their module, as the file does not say which of its weights they belong to.

    Raises:
        ConfigurationError: The directory holds no LoRA, or one of an unsupported kind.
    """
    config = read_lora_config(directory)
    tensors = read_tensors(directory)
    pairs = check_tensors(config, tensors, directory)
    products = {}
    for module in sorted(pairs, key=dot_natural_key):
        a, b = (tensors[each].float() for each in pairs[module])
        name = module.removeprefix("base_model.model.")
        products[name] = _saved(config, name, a, b, directory)
    return products, rest_of(config, tensors)


def _saved(config: LoraConfig, name: str, a: Tensor, b: Tensor, directory: Path) -> Factors:
    rank, alpha = rank_and_alpha(config, name)
    experts, rest = divmod(a.shape[0], rank)
    if rest or experts < 1 or (experts > 1 and not _is_fused(config, name)):
        raise ConfigurationError(
            f"{directory}: {name} has rank {a.shape[0]}, but adapter_config.json says {rank}; fetch both files again."
        )
    if experts > 1:
        a, b = expert_factors(a, b, experts)
    return Factors(a, b, alpha / (math.sqrt(rank) if config.use_rslora else rank), transposed=False)


def _is_fused(config: LoraConfig, name: str) -> bool:
    """Return whether a module may be fused experts, whose parameters are adapted directly."""
    plain = name.replace(".base_layer", "")
    targets = config.target_parameters or []
    return any(plain.endswith(each.rpartition(".")[0]) or not re.fullmatch(r"[\w.]+", each) for each in targets)


def _effective_rank(values: Tensor) -> Tensor:
    squares = values.square().sum(-1)
    return torch.where(squares > 0, values.sum(-1).square() / squares, 0.0)


def _eigenvalues(transform: Transform, *, inverse: bool) -> list[float]:
    """Return the eigenvalues of L R that can be non-zero, in descending order.

    They are those of the rank x rank matrix R L; with Q = U T, those of T diag(λ) Tᵀ, which is symmetric.
    """
    left, right = (each.double() for each in transform.factors(inverse=inverse))
    if transform.log_scales is None:
        values = torch.linalg.eigvals(right @ left).real
    else:
        t = torch.linalg.qr(transform.left.double(), mode="r")[1]
        scales = torch.expm1(transform.log_scales.double() * (-1 if inverse else 1))
        values = torch.linalg.eigvalsh(t * scales @ t.mT)
    return values.sort(descending=True).values.tolist()


def _error(approximated: float | None, true: float) -> float | None:
    return None if approximated is None or true == 0 else (approximated - true) / true
