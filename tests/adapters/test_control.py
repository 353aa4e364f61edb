"""The transform and Q's step, against float64 references written from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_pipelite.adapters.control import control, keep_orthogonal

torch.set_num_threads(1)
HIDDEN, RANK = 48, 5


def draw(orthogonal: bool = True) -> tuple[Tensor, ...]:
    """y, d, Q, S and c in float64."""
    torch.manual_seed(0)
    y, d = torch.randn(2, 3, 7, HIDDEN, dtype=torch.float64)
    q = torch.randn(HIDDEN, RANK, dtype=torch.float64)
    q = torch.linalg.qr(q)[0] if orthogonal else q / HIDDEN**0.5
    return y, d, q, 0.7 * torch.randn(RANK, dtype=torch.float64), torch.randint(-1, 2, (3, 7))


def reference(y: Tensor, d: Tensor, q: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """Each class by its own matrix, formed in full."""
    forward = q @ torch.diag(s.exp() - 1) @ q.T
    backward = q @ torch.diag((-s).exp() - 1) @ q.T
    added = torch.where((c == 1)[..., None], d @ forward.T, torch.zeros_like(d))
    return y + torch.where((c == -1)[..., None], d @ backward.T, added)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm().detach() / expected.norm().detach())


@pytest.mark.parametrize("orthogonal", [True, False])
def test_value_and_gradients_in_float32(orthogonal: bool) -> None:
    *exact, c = draw(orthogonal)
    exact = [t.requires_grad_() for t in exact]
    single = [t.detach().float().requires_grad_() for t in exact]
    weights = torch.randn(exact[0].shape, dtype=torch.float64)
    expected, found = reference(*exact, c), control(*single, c)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-6
    (expected * weights).sum().backward()
    (found * weights.float()).sum().backward()
    for ours, theirs in zip(single, exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-6


def test_gradients_by_finite_differences() -> None:
    *tensors, c = draw()
    assert torch.autograd.gradcheck(lambda *t: control(*t, c), [t.requires_grad_() for t in tensors])


def test_class_minus_one_undoes_class_plus_one() -> None:
    y, d, q, s, _ = (t.float() if t.is_floating_point() else t for t in draw())
    ones = torch.ones(3, 7, dtype=torch.int64)
    there = control(d, d, q, s, ones)
    assert (there - d).abs().max() > 0.1
    torch.testing.assert_close(control(there, there, q, s, -ones), d, rtol=0, atol=1e-6)
    assert torch.equal(control(y, d, q, s, 0 * ones), y)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(hidden_dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    y, d, q, s, c = draw()
    low = [y.to(hidden_dtype), d.to(hidden_dtype), q.to(adapter_dtype), s.to(adapter_dtype)]
    expected = reference(*[t.double() for t in low], c)
    low = [t.requires_grad_() for t in low]
    found = control(*low, c)
    assert found.dtype == hidden_dtype
    half = torch.bfloat16 in (hidden_dtype, adapter_dtype)
    assert relative(found, expected) < (4e-3 if half else 1e-6)
    found.sum().backward()
    assert [t.grad.dtype for t in low] == [t.dtype for t in low]


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
