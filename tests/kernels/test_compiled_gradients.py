"""What a compiled layer calls has the same gradients as in eager mode, whatever is trained.

torch 2.11 silently compiles wrong gradients for an autograd.Function whose forward returns a tensor that came out of
two of its calls, the second of which returned its input: ``to`` with the same dtype, ``contiguous``, an in-place sum,
an ``out=``. Everything that forward computes becomes an output of the compiled function, and autograd assigns the
gradient to the last of the two, so backward receives zeros. torch 2.13 is correct.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import quantize_4bit
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_pipelite.kernels import fp8
from lightning_pipelite.kernels.experts import Factors, Matrices, experts_in, experts_out
from lightning_pipelite.kernels.fp8_rows import quantise_rows
from lightning_pipelite.kernels.linear_cross_entropy import linear_cross_entropy
from lightning_pipelite.kernels.lora import lora_linear
from lightning_pipelite.kernels.nf4 import bitsandbytes_operations
from lightning_pipelite.kernels.routing import sort_by_expert

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")

TOKENS, EXPERTS, SIZE, INNER, RANK = 12, 3, 16, 32, 4


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CHOSEN = torch.arange(2 * TOKENS).view(TOKENS, 2) % EXPERTS
FIRST = Matrices([draw(EXPERTS, INNER, SIZE, seed=10)], (EXPERTS, INNER, SIZE), bias=draw(EXPERTS, INNER, seed=11))
SECOND = Matrices([draw(EXPERTS, SIZE, INNER, seed=12)], (EXPERTS, SIZE, INNER), bias=draw(EXPERTS, SIZE, seed=13))
LABELS = torch.arange(TOKENS) % INNER


def of_experts(x: Tensor, scores: Tensor, *factors: Tensor) -> Tensor:
    groups = sort_by_expert(CHOSEN, EXPERTS)
    first, second = (Factors(*factors[:2], 0.5), Factors(*factors[2:], 2.0)) if factors else (None, None)
    inner = torch.tanh(experts_in(x.sin(), groups, FIRST, first))
    return experts_out(inner, scores.softmax(-1), CHOSEN, groups, SECOND, second).cos()


def of_fp8(in_fp8: bool) -> Callable[[Tensor], Tensor]:
    weight, bias = quantise_rows(draw(INNER, SIZE, seed=10)), draw(INNER, seed=11)
    return lambda x: fp8.fp8_linear(x.sin(), weight, bias, in_fp8=in_fp8).cos()


def of_lora(in_fp8: bool) -> Callable[..., Tensor]:
    weights = [draw(INNER, SIZE, seed=10), draw(SIZE, SIZE, seed=11)]
    held = [quantise_rows(weight) if in_fp8 else [weight] for weight in weights]

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        outputs = lora_linear(x.sin(), held, factors[:2], factors[2:], [None, None], [1.0, 0.5], in_fp8=in_fp8)
        return outputs[0].cos() + outputs[1].sin().repeat(1, 1, INNER // SIZE)

    return function


def of_4bit(nested: bool) -> Callable[[Tensor], Tensor]:
    """Return bitsandbytes' function, which layers with 4-bit weights and no adapter call."""
    bitsandbytes_operations()
    codes, state = quantize_4bit(draw(INNER, 64, seed=10), quant_type="nf4", compress_statistics=nested)
    return lambda x: matmul_4bit(x.sin(), codes, quant_state=state).cos()


def of_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_cross_entropy(hidden.sin(), weight, LABELS, bias=bias, max_logits_bytes=4 * INNER * 5).sin()


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "experts": (
        of_experts,
        [(TOKENS, SIZE), (TOKENS, 2), (EXPERTS, RANK, SIZE), (EXPERTS, INNER, RANK), (EXPERTS, RANK, INNER),
         (EXPERTS, SIZE, RANK)],
    ),
    "frozen experts": (of_experts, [(TOKENS, SIZE), (TOKENS, 2)]),
    "fp8": (of_fp8(True), [(2, TOKENS, SIZE)]),
    "dequantised fp8": (of_fp8(False), [(2, TOKENS, SIZE)]),
    "projections": (
        of_lora(False),
        [(2, TOKENS, SIZE), (RANK, SIZE), (RANK, SIZE), (INNER, RANK), (SIZE, RANK)],
    ),
    "projections in fp8": (
        of_lora(True),
        [(2, TOKENS, SIZE), (RANK, SIZE), (RANK, SIZE), (INNER, RANK), (SIZE, RANK)],
    ),
    "4-bit": (of_4bit(False), [(TOKENS, 64)]),
    "nested 4-bit": (of_4bit(True), [(TOKENS, 64)]),
    "loss": (of_loss, [(TOKENS, SIZE), (INNER, SIZE), (INNER,)]),
}  # fmt: skip


def gradients(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], frozen: int | None) -> list[Tensor]:
    given = [draw(*shape, seed=seed).requires_grad_(seed != frozen) for seed, shape in enumerate(shapes)]
    result = function(*given)
    trained = [each for each in given if each.requires_grad]
    return [result, *torch.autograd.grad((result * draw(*result.shape, seed=99)).sum(), trained)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_gradients_are_those_without(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    compiled: Any = torch.compile(function, backend="aot_eager")
    again: Any = partial(checkpoint, compiled, use_reentrant=False)
    # The loss supports one backward pass only.
    for way, frozen in [(compiled, None)] if name == "loss" else [(compiled, None), (again, 0 if shapes[1:] else None)]:
        wanted = gradients(function, shapes, frozen)
        for found, expected in zip(gradients(way, shapes, frozen), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # wrong ones are off by about 1
