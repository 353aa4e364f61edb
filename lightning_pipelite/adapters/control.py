"""The transform of a Control Adapter, and the step that keeps its directions orthogonal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pipelite.precision import full_precision


def control(output: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor) -> Tensor:
    """y + Q diag(expm1(c · S)) Qᵀ d, for the tokens of all classes in one pass.

    Class +1 multiplies what d has along column i of Q by exp(Sᵢ) and adds the difference to y, class -1 by exp(-Sᵢ),
    class 0 adds nothing. It is computed in the precision of Q and S; only y's and d's gradients, and the result, are
    rounded to y's.

    Args:
        output: y, [..., hidden].
        delta: d, [..., hidden], of y's dtype.
        directions: Q, [hidden, rank].
        log_scales: S, [rank].
        classes: c, int64 [...].

    Returns:
        The sum, [..., hidden] in y's dtype.
    """
    return _Control.apply(output, delta, directions, log_scales, classes)


def keep_orthogonal(directions: Sequence[Tensor], gamma: float) -> None:
    """Q ← Q - gamma · Q(QᵀQ - I) for every Q [hidden, rank], in float32 and in place.

    With gamma = 0.5 this is a Newton-Schulz step to the nearest matrix with orthonormal columns (Björck and Bowie
    1971, SIAM J. Numer. Anal. 8(2)), which squares the residual of QᵀQ; a smaller gamma goes a part of the way.
    """
    alike: dict[Hashable, list[Tensor]] = {}
    for each in directions:
        alike.setdefault((each.shape, each.dtype, each.device), []).append(each.detach())
    with torch.no_grad(), full_precision():
        for same in alike.values():
            q = torch.stack(same).float()
            residual = q.mT @ q - torch.eye(q.shape[2], device=q.device)
            torch._foreach_copy_(same, list(torch.baddbmm(q, q, residual, alpha=-gamma).unbind()))


class _Control(torch.autograd.Function):
    """Not left to autograd: that would keep and pass over float32 copies of d and of its gradient."""

    @staticmethod
    @override
    def forward(
        ctx: Any, output: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor
    ) -> Tensor:
        d, c = delta.flatten(0, -2), classes.flatten().unsqueeze(1)
        eigenvalues = torch.expm1(c * _at_least_float32(log_scales))
        projected = _times(d, directions)
        ctx.save_for_backward(d, c, directions, projected, eigenvalues)
        ctx.scales_dtype = log_scales.dtype
        return _add_product(output.flatten(0, -2), projected * eigenvalues, directions).view_as(output)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        d, c, directions, projected, eigenvalues = ctx.saved_tensors
        g = gradient.flatten(0, -2)
        along = _times(g, directions)
        back = along * eigenvalues
        to_delta = to_directions = to_scales = None
        if ctx.needs_input_grad[1]:
            to_delta = _add_product(None, back, directions, dtype=g.dtype).view_as(gradient)
        if ctx.needs_input_grad[2]:
            both = _times(d.mT, back) + _times(g.mT, projected * eigenvalues)
            to_directions = both.to(directions.dtype)
        if ctx.needs_input_grad[3]:
            to_scales = (along * projected * c * (eigenvalues + 1)).sum(0).to(ctx.scales_dtype)
        return gradient, to_delta, to_directions, to_scales, None


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parts(tensor: Tensor, count: int) -> list[Tensor]:
    """Split float32 numbers into bfloat16 summands of falling size, eight bits each: three give all 24."""
    parts = []
    for _ in range(count):
        parts.append(tensor.bfloat16())
        tensor = tensor - parts[-1]
    return parts


def _in_parts(narrow: torch.dtype | None, wide: Tensor) -> bool:
    """Whether products of these types go over the tensor cores in parts."""
    return wide.is_cuda and narrow == torch.bfloat16 and wide.dtype == torch.float32


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in at least float32, where ``right`` has few columns."""
    if _in_parts(left.dtype, right):  # exact products on the tensor cores, with no float32 copy of ``left``
        columns = right.shape[1]
        product = torch.mm(left, torch.cat(_parts(right, 3), dim=1), out_dtype=torch.float32)
        return product.view(-1, 3, columns).sum(1)
    dtype = torch.promote_types(left.dtype, right.dtype)
    return _at_least_float32(left.to(dtype) @ right.to(dtype))


def _add_product(base: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """base + left @ rightᵀ in base's dtype, or left @ rightᵀ in ``dtype``, with few columns in ``left``."""
    dtype = dtype if base is None else base.dtype
    assert dtype is not None
    if _in_parts(dtype, right):
        a, b = _parts(left, 2), _parts(right, 2)
        # The product of the two small parts is below what float32 keeps of the sum.
        left, right = torch.cat([a[0], a[0], a[1]], dim=1), torch.cat([b[0], b[1], b[0]], dim=1)
        return left @ right.mT if base is None else torch.addmm(base, left, right.mT)
    product = left @ right.to(left.dtype).mT
    return product.to(dtype) if base is None else (base + product).to(dtype)
