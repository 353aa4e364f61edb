"""Q's orthogonalisation step equals a float64 reference written from the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_pipelite.adapters.orthogonal import keep_orthogonal

HIDDEN, RANK = 48, 5


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("gamma", [0.5, 0.1])
def test_step_of_q(gamma: float) -> None:
    torch.manual_seed(1)
    exact = [torch.linalg.qr(torch.randn(HIDDEN, r).double())[0] + 0.01 * torch.randn(HIDDEN, r) for r in (5, 5, 3)]
    single = [q.float() for q in exact]
    residuals = [(q.T @ q - torch.eye(q.shape[1])).norm() for q in exact]
    expected = [q - gamma * q @ (q.T @ q - torch.eye(q.shape[1]).double()) for q in exact]
    keep_orthogonal(single, gamma)
    for found, wanted, residual in zip(single, expected, residuals, strict=True):
        assert relative(found, wanted) < 1e-6
        after = (found.double().T @ found.double() - torch.eye(found.shape[1])).norm()
        assert after < (residual**2 if gamma == 0.5 else (1 - gamma) * residual)


def test_step_of_q_in_bfloat16_is_rounded_once() -> None:
    q = torch.linalg.qr(torch.randn(HIDDEN, RANK))[0].bfloat16()
    exact = q.float()
    keep_orthogonal([exact], 0.5)
    keep_orthogonal([q], 0.5)
    assert torch.equal(q, exact.bfloat16())
