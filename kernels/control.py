"""The transform of a Control Adapter, without float32 copies of hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def control(output: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor) -> Tensor:
    """Add Q diag(expm1(c · S)) Qᵀ d to y, for the tokens of all classes in one pass.

    Class +1 multiplies the component of d along column i of Q by exp(Sᵢ) and adds the difference to y, class -1 does so
    with exp(-Sᵢ), class 0 adds nothing. All is computed in the precision of Q and S; only the result and the gradients
    of y and d are rounded to y's dtype.

    Args:
        output: Y, [..., hidden].
        delta: D, [..., hidden], of y's dtype.
        directions: Q, [hidden, rank].
        log_scales: S, [rank].
        classes: C, int64 [...].

    Returns:
        The sum, [..., hidden] in y's dtype.
    """
    return torch.ops.pipelite.control(output, delta, directions, log_scales, classes)


def control_reference(output: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor) -> Tensor:
    """Compute the same in plain torch, in the precision of its arguments.

    Each class uses its own matrix, formed explicitly.
    """
    added = torch.zeros_like(delta)
    for sign in (1, -1):
        transform = directions @ torch.diag(torch.expm1(sign * log_scales)) @ directions.T
        added = torch.where((classes == sign).unsqueeze(-1), delta @ transform.T, added)
    return output + added


# A custom operation: autograd alone would save, and make passes over, float32 copies of d and of its gradient.
_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_LIBRARY.define("control(Tensor output, Tensor delta, Tensor directions, Tensor log_scales, Tensor classes) -> Tensor")
_LIBRARY.define(
    "control_backward(Tensor gradient, Tensor delta, Tensor directions, Tensor log_scales, Tensor classes, "
    "bool to_delta) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "control", "CompositeExplicitAutograd")
def _forward(output: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor) -> Tensor:
    eigenvalues = _eigenvalues(log_scales, classes)
    parts = _parts(directions, output.dtype)
    projected = _times(delta.flatten(0, -2), directions, parts)
    return _add_product(output.flatten(0, -2), projected * eigenvalues, directions, parts).view_as(output)


@torch.library.register_fake("pipelite::control", lib=_LIBRARY)
def _(output: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor) -> Tensor:
    return output.new_empty(output.shape)


@torch.library.impl(_LIBRARY, "control_backward", "CompositeExplicitAutograd")
def _backward(
    gradient: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor, to_delta: bool
) -> list[Tensor]:
    """Return the gradients of d (empty if not needed), Q and S."""
    eigenvalues = _eigenvalues(log_scales, classes)
    d, g = delta.flatten(0, -2), gradient.flatten(0, -2)
    parts = _parts(directions, g.dtype)
    projected, along = _times(d, directions, parts), _times(g, directions, parts)
    back = along * eigenvalues
    of_delta = gradient.new_empty(0)
    if to_delta:
        of_delta = _add_product(None, back, directions, parts, dtype=g.dtype).view_as(gradient)
    forth = projected * eigenvalues
    of_directions = _times(d.mT, back, _parts(back, g.dtype)) + _times(g.mT, forth, _parts(forth, g.dtype))
    signs = classes.flatten().unsqueeze(1)
    of_scales = (along * projected * signs * (eigenvalues + 1)).sum(0)
    return [of_delta, of_directions.to(directions.dtype), of_scales.to(log_scales.dtype)]


@torch.library.register_fake("pipelite::control_backward", lib=_LIBRARY)
def _(
    gradient: Tensor, delta: Tensor, directions: Tensor, log_scales: Tensor, classes: Tensor, to_delta: bool
) -> list[Tensor]:
    of_delta = gradient.new_empty(gradient.shape if to_delta else 0)
    return [of_delta, torch.empty_like(directions), torch.empty_like(log_scales)]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_delta = bool(ctx.needs_input_grad[1])
    gradients = torch.ops.pipelite.control_backward(gradient.contiguous(), *ctx.saved_tensors, to_delta)
    return gradient, gradients[0] if to_delta else None, gradients[1], gradients[2], None


torch.library.register_autograd("pipelite::control", _differentiate, setup_context=_keep, lib=_LIBRARY)


def _eigenvalues(log_scales: Tensor, classes: Tensor) -> Tensor:
    """Return the factor of each token's d along each column of Q, [tokens, rank]."""
    return torch.expm1(classes.flatten().unsqueeze(1) * _at_least_float32(log_scales))


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parts(wide: Tensor, narrow: torch.dtype) -> list[Tensor]:
    """Split float32 into three bfloat16 summands that together hold all 24 bits, for products on tensor cores.

    Returns an empty list where a product of these types needs no split.
    """
    return _summands(wide, 3) if _in_parts(narrow, wide) else []


def _summands(tensor: Tensor, count: int) -> list[Tensor]:
    summands = []
    for _ in range(count):
        summands.append(tensor.bfloat16())
        tensor = tensor - summands[-1]
    return summands


def _in_parts(narrow: torch.dtype, wide: Tensor) -> bool:
    return wide.is_cuda and narrow == torch.bfloat16 and wide.dtype == torch.float32


def _times(left: Tensor, right: Tensor, parts: list[Tensor]) -> Tensor:
    """Compute left @ right in at least float32; ``right`` has few columns, ``parts`` is its split if it needs one."""
    if parts:  # exact products, without a float32 copy of ``left``
        product = torch.mm(left, torch.cat(parts, dim=1), out_dtype=torch.float32)
        return product.view(-1, len(parts), right.shape[1]).sum(1)
    dtype = torch.promote_types(left.dtype, right.dtype)
    return _at_least_float32(left.to(dtype) @ right.to(dtype))


def _add_product(
    base: Tensor | None, left: Tensor, right: Tensor, parts: list[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Compute base + left @ rightᵀ in base's dtype, or left @ rightᵀ in ``dtype``; ``left`` has few columns."""
    if parts:
        first, second = _summands(left, 2)
        # The product of the two small parts is below the float32 precision of the sum.
        left = torch.cat([first, first, second], dim=1)
        right = torch.cat([parts[0], parts[1], parts[0]], dim=1)
        return left @ right.mT if base is None else torch.addmm(base, left, right.mT)
    product = left @ right.to(left.dtype).mT
    return product.to(dtype) if base is None else (base + product).to(base.dtype)
