"""A direct launch takes the compiled kernel that fits its arguments, as Triton does; graphs pass operands once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_pipelite.kernels.fp8_rows import WIDEST, cast_rows
from lightning_pipelite.kernels.launch import _COMPILED, launch


@triton.jit
def _scaled(x, out, count, stride, by, TIMES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read every ``stride``-th number; wide loads are right only where addresses and strides allow them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(x + at * stride, mask=inside).to(tl.float32) * (by % 1024) * TIMES
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def launched(x: torch.Tensor, count: int, stride: int, by: int, **constants: int) -> torch.Tensor:
    out = torch.full((count,), float("nan"), device=x.device, dtype=x.dtype)
    launch(_scaled, (triton.cdiv(count, 128), 1, 1), x, out, count, stride, by, BLOCK=128, **constants)
    return out


@pytest.mark.gpu
def test_each_launch_takes_the_kernel_that_fits() -> None:
    """In two rounds over all cases: the first launches each through Triton, the second directly."""
    numbers = torch.arange(16384, device="cuda") % 97
    cases: list[tuple[torch.dtype, int, int, int, int, dict[str, Any]]] = [
        (dtype, first, count, stride, by, {"TIMES": times, **options})
        for dtype in (torch.float32, torch.bfloat16)
        for first in (0, 1, 16)
        for count, stride in ((1024, 1), (1000, 1), (1000, 3), (512, 16), (1, 1))
        for by in (1, 3, 16, 2**31 + 5)
        for times, options in ((1, {}), (2, {}), (2, {"num_warps": 8}))
    ]
    for _ in range(2):
        for dtype, first, count, stride, by, constants in cases:
            x = numbers.to(dtype)[first:]
            wanted = x[: count * stride : stride].float() * (by % 1024) * constants["TIMES"]
            assert torch.equal(launched(x, count, stride, by, **constants), wanted.to(dtype)), (dtype, first, count)
    assert len([key for key in _COMPILED if key[0] == id(_scaled)]) > 20


@pytest.mark.parametrize("multiplied", [False, True])
def test_a_graph_passes_what_it_computes_as_one_operand(multiplied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler would compute and write it once for each. Traced for a GPU, which need not be there."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with FakeTensorMode():
        x = torch.empty(12, WIDEST + 16, dtype=torch.bfloat16, device="cuda")
        by = torch.empty(WIDEST + 16, device="cuda") if multiplied else None
        torch.compile(lambda x: cast_rows(x.sin(), by), backend=keep, fullgraph=True)(x)
    (kernel,) = (node for node in graphs[0].graph.nodes if node.target is triton_kernel_wrapper_mutation)
    operands = [operand for operand in kernel.kwargs["kwargs"].values() if isinstance(operand, torch.fx.Node)]
    assert len(operands) == 6
    assert {operand.target for operand in operands if operands.count(operand) > 1} == {"new_empty"}


@pytest.mark.gpu
def test_compiled_wide_rows_are_written_once_before_their_cast() -> None:
    x = torch.randn(4096, 2 * WIDEST, device="cuda", dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: cast_rows(x.sin()), fullgraph=True)
    compiled(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codes, _ = compiled(x)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes + codes.nbytes + 2**20
