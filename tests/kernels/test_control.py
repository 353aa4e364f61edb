"""The transform equals float64 references written from the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lightning_pipelite.kernels.control as control_module
from lightning_pipelite.kernels.control import control, control_reference

HIDDEN, RANK = 48, 5


def draw(orthogonal: bool = True) -> tuple[Tensor, ...]:
    """Return y, d, Q and S in float64, and the classes c."""
    torch.manual_seed(0)
    y, d = torch.randn(2, 3, 7, HIDDEN, dtype=torch.float64)
    q = torch.randn(HIDDEN, RANK, dtype=torch.float64)
    q = torch.linalg.qr(q)[0] if orthogonal else q / HIDDEN**0.5
    return y, d, q, 0.7 * torch.randn(RANK, dtype=torch.float64), torch.randint(-1, 2, (3, 7))


def reference(y: Tensor, d: Tensor, q: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """Apply each class's own matrix, materialised in full."""
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


def test_the_kernels_own_reference() -> None:
    tensors = draw(orthogonal=False)
    torch.testing.assert_close(control_reference(*tensors), reference(*tensors))


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


def check_mixed_precision(device: str) -> None:
    """bfloat16 hidden states and float32 adapters: only the result and the gradients of the states are rounded."""
    *tensors, c = (t.to(device) for t in draw())
    low = [t.bfloat16() if t.ndim == 3 else t.float() for t in tensors]
    exact = [t.double().requires_grad_() for t in low]
    low = [t.requires_grad_() for t in low]
    expected, found = reference(*exact, c), control(*low, c)
    weights = torch.randn(expected.shape).to(device).bfloat16()
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert relative(found, expected) < 3e-3
    limits = (1e-6, 3e-3, 1e-6, 1e-6)
    for ours, theirs, limit in zip(low, exact, limits, strict=True):
        assert relative(ours.grad, theirs.grad) < limit


def test_mixed_precision_without_tensor_cores() -> None:
    check_mixed_precision("cpu")


def test_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the GPU path, emulating the one operation that a CPU lacks."""
    monkeypatch.setattr(
        control_module,
        "_in_parts",
        lambda narrow, wide: narrow == torch.bfloat16 and wide.dtype == torch.float32,
    )
    calls = []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        calls.append(b.shape)
        return (a.double() @ b.double()).to(out_dtype)

    monkeypatch.setattr(control_module.torch, "mm", mm)
    check_mixed_precision("cpu")
    assert calls == [(HIDDEN, 3 * RANK)] * 3 + [(21, 3 * RANK)] * 2


@pytest.mark.gpu
def test_mixed_precision_on_a_gpu() -> None:
    check_mixed_precision("cuda")
