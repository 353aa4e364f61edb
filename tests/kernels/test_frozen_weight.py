"""Frozen weights in nf4, on a CPU: each of its values times the scale of its block of 64, in the order of the rows."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

from lightning_pipelite.kernels.frozen_weight import BLOCK, dequantise
from lightning_pipelite.models.quantization.four_bit import nf4

SHAPES = [(8, 96), (5, 96), (7, 31), (3, 5, 32), (4, 128)]  # rows of no whole blocks, of an odd number, of whole ones


def quantised(shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Weights whose rows differ much in size, as codes and scales; and what these stand for, by hand."""
    sizes = torch.logspace(-3, 3, shape[-2]).unsqueeze(1)
    codes, state = quantize_4bit(torch.randn(shape) * sizes, quant_type="nf4")
    numbers = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=-1).flatten().int()
    scales = state.absmax.repeat_interleave(BLOCK)
    count = torch.Size(shape).numel()
    return [codes, state.absmax], (state.code[numbers[:count]] * scales[:count]).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_value_has_the_scale_of_its_block(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts, wanted = quantised(shape)
    assert torch.equal(dequantise(parts, shape, dtype), wanted.to(dtype))


def test_the_layers_of_bitsandbytes_compute_with_the_same() -> None:
    nf4([], torch.float32, double_quant=False)
    layer = Linear4bit(96, 8, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(8, 96) * torch.logspace(-3, 3, 8).unsqueeze(1)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    state = layer.weight.quant_state
    x = torch.randn(3, 96, requires_grad=True)
    wanted = x @ dequantise([layer.weight.data, state.absmax], (8, 96), torch.float32).T
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x.detach()), wanted.detach())
