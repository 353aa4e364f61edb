"""Triton's compiler, which needs no GPU, accepts the kernels. The interpreter accepts much that it would reject."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_pipelite.kernels import (
    combine,
    cross_entropy,
    fp8,
    fp8_outer,
    fp8_rows,
    grouped_outer,
    grouped_product,
    groups,
    low_rank_sum,
    routing,
    scale,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int, capability: int, stages: int = 3
) -> Any:
    """Compile it for addresses and numbers that are multiples of 16, which lets it read ahead most."""
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind[0] == "*" or kind == "i32"
    }
    source = ASTSource(kernel, signature, constants, multiples)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("softcap", "weighted"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("dtype", "size", "vocabulary"), [("bf16", 2, 128_256), ("fp16", 2, 17), ("fp32", 4, 32_000)])
def test_cross_entropy(
    dtype: str, size: int, vocabulary: int, softcap: bool, weighted: bool, gradient: bool, capability: int
) -> None:
    warps, values = cross_entropy._layout(vocabulary)
    arguments = {"logits": f"*{dtype}", "labels": "*i64", "weights": "*fp32", "losses": "*fp32"}
    arguments |= {"stride": "i32", "vocabulary": "i32", "scale": "fp32", "softcap": "fp32"}
    constants = {"SOFTCAP": softcap, "WEIGHTED": weighted, "GRADIENT": gradient, "IGNORED": cross_entropy.IGNORED}
    constants |= {"BLOCK": 32 * warps * values, "LOAD": cross_entropy.LOAD_BYTES // size}
    assert "exp2" in compiled(cross_entropy._kernel, arguments, constants, warps, capability).asm["ttir"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_scale(dtype: str) -> None:
    arguments = {"values": f"*{dtype}", "factor": "*fp32", "number": "i32"}
    assert compiled(scale._kernel, arguments, {"BLOCK": scale.BLOCK}, 4, 90).asm["ptx"]


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_fp8(capability: int) -> None:
    arguments = {"u": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "sums": "*fp32"}
    arguments |= dict.fromkeys(("rows", "part", "width", "few"), "i32")
    constants = {"FEW": 64, "COLUMNS": fp8_outer.COLUMNS, "DEPTH": fp8_outer.DEPTH, "PRECISION": "tf32"}
    made = compiled(fp8_outer._outer, arguments, constants, 4, capability, 2)
    assert made.metadata.shared <= SHARED[capability] * 1024
    arguments = dict.fromkeys("xyz", "*bf16") | {"by": "*fp32", "codes": "*fp8e4nv", "scales": "*fp32"}
    arguments |= dict.fromkeys(("of_x", "of_y", "of_z"), "i32")
    constants = {"PARTS": fp8_rows.MOST, "MULTIPLIED": True, "LARGEST": fp8_rows.LARGEST, "SMALLEST": fp8_rows.SMALLEST}
    made = compiled(fp8_rows._cast, arguments, constants | {"BLOCK": fp8_rows.BLOCK}, 8, capability)
    assert "cvt.rn.satfinite.e4m3x2" in made.asm["ptx"]
    arguments = {"source": "*i32", "out": "*i32", "rows": "i32", "columns": "i32"}
    constants = {"ROWS": fp8.ROWS, "COLUMNS": fp8.COLUMNS}
    assert compiled(fp8._transpose, arguments, constants, 4, capability).asm["ptx"]


@pytest.mark.parametrize(
    ("dtype", "precision", "turned", "capability"),
    [
        *(("bf16", "tf32", *others) for others in itertools.product((True, False), (89, 90, 120))),
        ("fp32", "ieee", True, 89),  # takes the compiler ten seconds; of the three, this GPU has the least memory
    ],
)
def test_low_rank_sum(dtype: str, precision: str, turned: bool, capability: int) -> None:
    numbers = range(1, low_rank_sum.MOST + 1)
    tensors = ("base", "left", *(f"{name}_{n}" for name in ("right", "out") for n in numbers))
    counts = ("rows", "of_base", "of_left", *(f"{name}_{n}" for name in ("width", "few") for n in numbers))
    constants = {"TURNED": turned, "SCALE": 0.5, "ROWS": low_rank_sum.ROWS, "PRECISION": precision}
    constants |= {"COLUMNS": low_rank_sum.COLUMNS, "FEW": low_rank_sum.FEW}
    arguments = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(counts, "i32")
    made = compiled(low_rank_sum._add, arguments, constants, 8, capability, 1)
    assert made.metadata.shared <= SHARED[capability] * 1024


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory that a block can use, by compute capability."""


@pytest.mark.parametrize(
    ("dtype", "width", "capability"),
    [*itertools.product(["bf16"], [16, 1536], SHARED), ("fp16", 1536, 90), ("fp32", 1536, 86)],
)
def test_grouped_product(dtype: str, width: int, capability: int) -> None:
    rows = torch.empty(4, 8, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    shape = grouped_product.product_shape(rows, width, capability // 10)
    tensors = dict.fromkeys(("x", "weight", "left", "right", "bias", "out"), f"*{dtype}")
    numbers = (
        "x_stride",
        "group_stride",
        "out_stride",
        "right_group_stride",
        "right_out_stride",
        "most_tiles",
        "width",
    )
    arguments = tensors | dict.fromkeys(("order", "bounds", "tiles"), "*i32")
    arguments |= dict.fromkeys((*numbers, "depth", "few", "columns_count"), "i32")
    constants = {"in_stride": 1, "right_few_stride": 1, "COPIES": 8, "BIASED": True, "ADDED": 16, "WHOLE": True}
    constants |= {"ROWS": groups.MOST_ROWS, "COLUMNS": shape.columns, "DEPTH": shape.depth, "PRECISION": "ieee"}
    made = compiled(grouped_product._product, arguments, constants, shape.warps, capability, shape.stages)
    assert made.metadata.shared <= SHARED[capability] * 1024


def test_the_kernels_around_grouped_products() -> None:
    arguments = {"u": "*bf16", "v": "*bf16", "order": "*i32", "bounds": "*i32", "scores": "*bf16", "out": "*fp32"}
    arguments |= {"u_stride": "i32", "v_stride": "i32", "scale": "fp32", "width": "i32", "few": "i32"}
    constants = {"COPIES": 8, "SCORED": True, "FEW": 16, "COLUMNS": 128, "DEPTH": 64, "PRECISION": "tf32"}
    assert "dot" in compiled(grouped_outer._outer, arguments, constants, 4, 80).asm["ttir"]
    arguments = {"y": "*bf16", "places": "*i32", "scores": "*fp32", "out": "*bf16", "width": "i32"}
    assert compiled(combine._sum_copies, arguments, {"COPIES": 8, "SCORED": True, "BLOCK": 1024}, 4, 80).asm["ptx"]
    arguments = {"gradient": "*bf16", "y": "*bf16", "order": "*i32", "scores": "*fp32", "of_y": "*bf16", "width": "i32"}
    assert compiled(combine._weigh, arguments | {"of_scores": "*fp32"}, {"BLOCK": 1024}, 4, 80).asm["ptx"]
    numbers = dict.fromkeys(("count", "experts", "blocks", "room"), "i32")
    places = dict.fromkeys(("counts", "bounds", "order", "places", "tiles"), "*i32") | {"chosen": "*i64"}
    for kernel in (routing._count, routing._add_up, routing._place):
        known = {name: kind for name, kind in (numbers | places).items() if name in kernel.arg_names}
        sizes = {"EXPERTS": 128, "BLOCK": routing.BLOCK, "BLOCKS": routing.BLOCKS, "ROWS": 128}
        assert compiled(kernel, known, {n: v for n, v in sizes.items() if n in kernel.arg_names}, 8, 80).asm["ptx"]
