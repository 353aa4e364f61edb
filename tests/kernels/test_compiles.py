"""Triton's compiler, which needs no GPU, takes the kernels: its interpreter takes much that the compiler refuses."""

from __future__ import annotations

import os
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_pipelite.kernels import cross_entropy, scale

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")


def compiled(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int, capability: int) -> Any:
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


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
