"""Frozen weights in nf4: each value is multiplied by the scale of its block of 64, in row-major order."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.nf4 import BLOCK, SCALES_BLOCK, dequantise, dequantise_by_bitsandbytes
from lightning_pipelite.models.quantization.four_bit import kernel_parts, nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows of partial blocks, of odd length, of whole blocks; more scales than one block of scales, some left over.
SHAPES = [(8, 96), (5, 96), (7, 31), (3, 5, 32), (4, 128), (64, 64), (65, 288)]


def quantised(shape: tuple[int, ...], scaled: str) -> tuple[list[Tensor], Tensor]:
    """Return the parts of weights whose rows differ widely in size, and the weights dequantised by hand."""
    sizes = torch.logspace(-3, 3, shape[-2]).unsqueeze(1)
    codes, state = quantize_4bit(torch.randn(shape) * sizes, quant_type="nf4", compress_statistics=bool(scaled))
    parts, scales = [codes, state.absmax], state.absmax
    if scaled:
        outer = state.state2
        offset = state.offset if scaled == "one offset" else torch.rand(len(outer.absmax))
        parts += [outer.absmax, outer.code, offset]
        each, added = (
            of.expand(len(outer.absmax)).repeat_interleave(SCALES_BLOCK)[: len(scales)] for of in (outer.absmax, offset)
        )
        scales = outer.code[scales.int()] * each + added
    numbers = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=-1).flatten().int()
    count = torch.Size(shape).numel()
    return parts, (state.code[numbers[:count]] * scales.repeat_interleave(BLOCK)[:count]).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", ["", "one offset", "an offset each"])  # not empty where scales are quantised
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_value_has_the_scale_of_its_block(shape: tuple[int, ...], scaled: str, dtype: torch.dtype) -> None:
    parts, wanted = quantised(shape, scaled)
    parts = [part.to(DEVICE) for part in parts]
    made = dequantise(parts, shape, dtype).cpu()
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates instead of rounding
        torch.testing.assert_close(made, wanted.to(dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(made, wanted.to(dtype))
    assert torch.equal(dequantise_by_bitsandbytes(parts, shape, dtype).cpu(), wanted.to(dtype))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run natively")
def test_under_the_interpreter() -> None:
    pass_interpreted(__file__)


def test_the_layers_of_bitsandbytes_compute_with_the_same() -> None:
    nf4([], torch.float32, double_quant=False)  # corrects bitsandbytes' operation
    layer = Linear4bit(96, 8, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(8, 96) * torch.logspace(-3, 3, 8).unsqueeze(1)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    state = layer.weight.quant_state
    x = torch.randn(3, 96, requires_grad=True)
    wanted = x @ dequantise([layer.weight.data, state.absmax], (8, 96), torch.float32).T
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x.detach()), wanted.detach())


@pytest.mark.parametrize("double", [False, True], ids=["scales", "quantised scales"])
def test_codes_are_taken_in_bytes_only(double: bool) -> None:
    weight = torch.randn(8, 128, device=DEVICE)

    def quantise(kind: str, storage: torch.dtype) -> tuple[Tensor, QuantState]:
        return quantize_4bit(weight, quant_type=kind, compress_statistics=double, quant_storage=storage)

    held = quantise("nf4", torch.uint8)
    parts = kernel_parts(*held)
    assert parts is not None
    assert torch.equal(dequantise(parts, weight.shape, weight.dtype), dequantize_4bit(*held))
    for storage in (torch.bfloat16, torch.float32, torch.int8):
        says = f"^the codes of an nf4 weight are in {storage}; leave out bnb_4bit_quant_storage, or set it to uint8\\.$"
        with pytest.raises(ConfigurationError, match=says):
            kernel_parts(*quantise("nf4", storage))
    assert kernel_parts(*quantise("fp4", torch.bfloat16)) is None  # like any other format
