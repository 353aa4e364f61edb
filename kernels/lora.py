"""Linear layers computed together with their low-rank adapters, without float32 copies of activations.

The products use torch's matrix multiplication, which no Triton kernel beats with so few columns; the gain is in how
they are combined. Projections that share their input (query, key and value) are computed by one operation: the input is
multiplied by all their A at once, each frozen weight's product is added in place to that of B, and the backward pass
accumulates a single gradient of the input in place. Only the input and x·Aᵀ [tokens, rank] are saved.

Frozen weights are unquantised, in nf4, or in FP8 (:mod:`~lightning_pipelite.kernels.fp8_lora`). In FP8 the input is
cast once for all projections, and saved as its codes, from which the gradient of A is computed. Products in FP8 take a
GPU half the time, but the host as long as others; so weights that are contiguous in memory are multiplied as one, and,
unless their outputs are wide, all B as one block-diagonal matrix. So are small weights in nf4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.kernels.fp8_lora import cast_gradients, casts_are_fused, gradient_of_x, outputs_in_fp8
from lightning_pipelite.kernels.fp8_outer import outer_with_codes
from lightning_pipelite.kernels.fp8_rows import WIDEST, cast_rows
from lightning_pipelite.kernels.frozen_weight import whole
from lightning_pipelite.kernels.lora_operands import Operands


def lora_linear(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    projected: Sequence[Tensor] | None = None,
    *,
    in_fp8: bool = False,
) -> list[Tensor]:
    """Return ``x Wᵢᵀ + biasᵢ + sᵢ (x Aᵢᵀ) Bᵢᵀ`` for every i, preparing x once for all.

    Products are accumulated in float32 and their results rounded to x's dtype. A and B are rounded to it for the
    computation; their gradients, which sum over all tokens, are not.

    Args:
        x: [..., in], the computation's dtype.
        weights: Frozen Wᵢ [out, in] of x's dtype, as one tensor; or its parts in nf4, or its codes, scales and
            optionally transposed codes in FP8, see :mod:`~lightning_pipelite.kernels.frozen_weight`. Or a single weight
            in FP8 or nf4 that holds all Wᵢ consecutively, if all sᵢ are equal.
        a: Aᵢ [rank, in], of any floating dtype.
        b: Bᵢ [out, rank].
        biases: [out], or None.
        scales: The scale sᵢ of each.
        projected: The products x Aᵢᵀ [..., rank] if something such as dropout lies between; ``a`` is then not used.
        in_fp8: Whether products with the weights, all of them in FP8, are computed in FP8 rather than with dequantised
            weights.

    Returns:
        [..., out] each, in x's dtype.
    """
    rows, given = x.flatten(0, -2), [each.flatten(0, -2) for each in projected or ()]
    trained, widths, joined = [*(given or a), *b], [up.shape[0] for up in b], len(weights) < len(b)
    if joined:
        biases = [_joined(biases, widths, x)]
    # In FP8, wide outputs are written apart, as copying them apart would take a GPU longer than this takes the host.
    as_one = joined and (not in_fp8 or max(widths) <= WIDEST)
    if as_one:
        given = [torch.cat(given, dim=1)] if given else []
        b, scales = [torch.block_diag(*[up.detach() for up in b])], scales[:1]
    down, ups = _rounded([] if given else a, b, x.dtype)
    # Outside the operation below, so that recomputing this product does not rerun the rest.
    along = [rows.detach() @ down.T] if down is not None else [each.detach() for each in given]
    codes, row_scales = [[each] for each in cast_rows(rows.detach())] if in_fp8 else ([], [])
    operands = Operands(
        down=[] if down is None else [down],
        along=along,
        ups=ups,
        weights=[list(weight) for weight in weights],
        biases=[[] if bias is None else [bias] for bias in biases],
        row_scales=row_scales,
        scales=list(scales),
    )
    outputs = torch.ops.pipelite.differentiable_lora_linear(rows, codes, trained, *operands.flat())
    if as_one:
        # Copies, which the compiler fuses into their consumers: a model may view them freely and modify them in place.
        outputs = [part.clone(memory_format=torch.contiguous_format) for part in outputs[0].split(widths, dim=1)]
    return [output.view(*x.shape[:-1], width) for output, width in zip(outputs, widths, strict=True)]


def _joined(biases: Sequence[Tensor | None], widths: Sequence[int], x: Tensor) -> Tensor | None:
    """Return all biases concatenated, with zeros for those that are missing; None if all are."""
    if all(bias is None for bias in biases):
        return None
    each = zip(biases, widths, strict=True)
    return torch.cat([x.new_zeros(width) if bias is None else bias for bias, width in each])


def _rounded(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """Return all A concatenated [ranks, in], if any, and each B, in ``dtype``: cast together, as each is small."""
    tensors = [tensor.detach() for tensor in (*a, *b)]
    if any(tensor.dtype != dtype for tensor in tensors):
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
        parts = flat.split([tensor.numel() for tensor in tensors])
        tensors = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        down = flat[: sum(tensor.numel() for tensor in a)].view(-1, a[0].shape[1]) if a else None
    else:
        down = torch.cat(tensors[: len(a)]) if a else None
    return down, tensors[len(a) :]


def lora_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
) -> list[Tensor]:
    """Compute the same in plain torch, in the precision of its arguments."""
    return [
        torch.nn.functional.linear(x, w, bias) + scale * (x @ down.T @ up.T)
        for w, down, up, bias, scale in zip(weights, a, b, biases, scales, strict=True)
    ]


# Custom operations: if the compiler saw weights being dequantised, it would save them for the backward pass, and it
# would make copies for in-place additions. Not torch.library.custom_op, whose checks of each call take the host longer
# than the products take a GPU. Nor torch.library.register_autograd, whose Python code would run in all calls, including
# those of a compiled layer, where nothing is left to differentiate: instead, an operation without gradients does the
# work, and a composite one, which is decomposed before compilation, adds the gradients.
_LIBRARY = torch.library.Library("pipelite", "FRAGMENT")
_OPERANDS = "Tensor[] operands, int[] counts, float[] scales"
_LIBRARY.define(f"differentiable_lora_linear(Tensor x, Tensor[] codes, Tensor[] trained, {_OPERANDS}) -> Tensor[]")
_LIBRARY.define(f"lora_linear(Tensor x, Tensor[] codes, {_OPERANDS}) -> Tensor[]")
_LIBRARY.define(
    f"lora_linear_backward(Tensor[] gradients, Tensor[] codes, Tensor x, {_OPERANDS}, bool to_x) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "lora_linear", "CompositeExplicitAutograd")
def forward_operation(x: Tensor, codes: list[Tensor], *flat: Any) -> list[Tensor]:
    """Return the output of each projection [tokens, out].

    Args:
        x: [tokens, in].
        codes: E4m3 codes of x, if products are computed in FP8.
        flat: :class:`Operands`, flattened.
    """
    it = Operands.of(*flat)
    if codes:
        return outputs_in_fp8(codes, it, x.dtype)
    outputs = []
    for weight, bias, along, up, scale in zip(it.weights, it.biases, it.alongs, it.ups, it.scales, strict=True):
        # The adapter's product first: the large one is compute-bound and reads what it adds to at little cost. On an
        # H100, 4096 tokens from 4096 to 14336: 0.76 ms, 0.83 in the other order, 0.71 for the large product alone.
        if bias:
            output = torch.addmm(bias[0], along, up.T, alpha=scale)
        else:
            output = x.new_empty(x.shape[0], up.shape[0]).addmm_(along, up.T, beta=0, alpha=scale)
        outputs.append(output.addmm_(x, whole(weight, up.shape[0], x).T))
    return outputs


@torch.library.register_fake("pipelite::lora_linear", lib=_LIBRARY)
def _(x: Tensor, codes: list[Tensor], *flat: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], up.shape[0]) for up in Operands.of(*flat).ups]


@torch.library.impl(_LIBRARY, "lora_linear_backward", "CompositeExplicitAutograd")
def backward_operation(gradients: list[Tensor], codes: list[Tensor], x: Tensor, *flat_to_x: Any) -> list[Tensor]:
    """Return the gradients of x (empty if not needed), of all A concatenated or all given projections, and of each B.

    Those of A and B are in float32. An output that was not used has an empty gradient.

    Args:
        gradients: The gradient of each output [tokens, out].
        codes: If products are computed in FP8 and their casts are fused, what :func:`cast_gradients` returned.
        x: The input [tokens, in]; or its codes, if products are computed in FP8.
        flat_to_x: :class:`Operands`, flattened, and whether x needs a gradient.
    """
    *flat, to_x = flat_to_x
    it = Operands.of(*flat)
    back = x.new_empty(x.shape[0], sum(it.ranks), dtype=it.ups[0].dtype)
    backs = back.split(it.ranks, dim=1) if len(it.ups) > 1 else [back]
    given = [g if g.numel() else None for g in gradients]
    of_b = []
    for g, along, of_along, up, scale in zip(given, it.alongs, backs, it.ups, it.scales, strict=True):
        if g is None:
            of_along.zero_()
            of_b.append(torch.zeros_like(up, dtype=torch.float32))
            continue
        torch.mm(g, up, out=of_along)
        of_up = _precise_product(g.T, along)
        if scale != 1:
            of_along.mul_(scale)
            of_up.mul_(scale)
        of_b.append(of_up)
    if not it.down:
        of_first = back
    elif it.row_scales:
        of_first = outer_with_codes(back, x, it.row_scales[0])
    else:
        of_first = _precise_product(back.T, x)
    if not to_x:
        return [back.new_empty(0), of_first, *of_b]
    if it.row_scales:
        return [gradient_of_x(given, codes, back, it), of_first, *of_b]
    of_x = back @ it.down[0] if it.down else back.new_zeros(x.shape)  # the small product first, as in the forward pass
    for g, weight, up in zip(given, it.weights, it.ups, strict=True):
        if g is not None:
            of_x.addmm_(g, whole(weight, up.shape[0], of_x))
    return [of_x, of_first, *of_b]


@torch.library.register_fake("pipelite::lora_linear_backward", lib=_LIBRARY)
def _(gradients: list[Tensor], codes: list[Tensor], x: Tensor, *flat_to_x: Any) -> list[Tensor]:
    *flat, to_x = flat_to_x
    it = Operands.of(*flat)
    of_x = it.ups[0].new_empty(x.shape if to_x else 0)
    if it.down:
        of_first = torch.empty_like(it.down[0], dtype=torch.float32)
    else:
        of_first = of_x.new_empty(it.along[0].shape[0], sum(it.ranks))
    return [of_x, of_first, *(torch.empty_like(up, dtype=torch.float32) for up in it.ups)]


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        codes: list[Tensor],
        operands: list[Tensor],
        counts: list[int],
        scales: list[float],
        x: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        it = Operands.of(operands, counts, scales)
        tensors, ctx.counts, ctx.scales = it._replace(biases=[[] for _ in it.biases]).flat()
        ctx.dtypes = [tensor.dtype for tensor in trained]
        ctx.shapes = [up.shape for up in trained[len(trained) // 2 :]]
        ctx.save_for_backward(codes[0] if codes else x, *tensors)
        return (*torch.ops.pipelite.lora_linear(x, codes, operands, counts, scales),)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        it = Operands.of(tensors, ctx.counts, ctx.scales)
        nothing = it.ups[0].new_empty(0)
        given = [nothing if gradient is None else gradient for gradient in gradients]
        to_x = bool(ctx.needs_input_grad[4])
        codes = []
        if it.row_scales and to_x and casts_are_fused(it):
            codes = cast_gradients([g if g.numel() else None for g in given], it, now=False)
        of_x, of_first, *of_b = torch.ops.pipelite.lora_linear_backward(
            given, codes, x, tensors, ctx.counts, ctx.scales, to_x
        )
        ranks = [rank for _, rank in ctx.shapes]
        if len(of_b) < len(ranks):
            of_b = _diagonal(of_b[0], ctx.shapes)
        of_trained = [*of_first.split(ranks, dim=0 if it.down else 1), *of_b]
        of_trained = [gradient.to(dtype) for gradient, dtype in zip(of_trained, ctx.dtypes, strict=True)]
        return None, None, None, None, of_x if to_x else None, *of_trained


@torch.library.impl(_LIBRARY, "differentiable_lora_linear", "CompositeImplicitAutograd")
def _differentiable(
    x: Tensor,
    codes: list[Tensor],
    trained: list[Tensor],
    operands: list[Tensor],
    counts: list[int],
    scales: list[float],
) -> list[Tensor]:
    """Return the same outputs as ``lora_linear``, with gradients for x and ``trained``.

    ``trained`` is all A, or the given projections [tokens, rank], and all B; the values that the computation uses are
    among the operands.
    """
    return [*_Gradients.apply(codes, operands, counts, scales, x, *trained)]


def _diagonal(whole: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the blocks along the diagonal."""
    heights, widths = zip(*shapes, strict=True)
    return [rows.split(widths, dim=1)[number] for number, rows in enumerate(whole.split(heights))]


def _precise_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute left @ right, a sum over many tokens, in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda or left.is_meta:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
