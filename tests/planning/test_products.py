"""The operations that the meter counts, and that it refuses those that it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pipelite.kernels.control import control
from lightning_pipelite.kernels.fp8_rows import WIDEST, cast_rows
from lightning_pipelite.planning.meter import BLOCK, Meter
from lightning_pipelite.planning.products import FORMULAS, NO_PRODUCTS, UnknownProductError

META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def bounds(groups: int) -> torch.Tensor:
    return torch.empty(groups, dtype=torch.int32, device=META)


GROUPED = {
    "rows by a matrix for each group": ((24, 16), (3, 16, 32), 24 * 16 * 32),
    "a matrix for each group by columns": ((3, 32, 16), (16, 24), 32 * 16 * 24),
    "summed over each group": ((32, 24), (24, 16), 32 * 24 * 16),
    "a batch": ((3, 8, 16), (3, 16, 32), 3 * 8 * 16 * 32),
}


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_products(case: str) -> None:
    left, right, pairs = GROUPED[case]
    with Meter() as meter:
        torch._grouped_mm(empty(*left), empty(*right), offs=None if case == "a batch" else bounds(3))
    assert meter.flops == {2: 2 * pairs}


def test_the_gradients_of_a_grouped_product_take_twice_as_many() -> None:
    left, right = empty(24, 16).requires_grad_(), empty(3, 16, 32).requires_grad_()
    with Meter() as meter:
        torch._grouped_mm(left, right, offs=bounds(3)).backward(empty(24, 32))
    assert meter.flops == {2: 3 * 2 * 24 * 16 * 32}


@pytest.mark.parametrize(("dtype", "summands"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_control_adapters(dtype: torch.dtype, summands: int) -> None:
    delta, directions = empty(1, 10, 64, dtype=dtype).requires_grad_(), empty(64, 4, dtype=torch.float32)
    directions.requires_grad_()
    scales, classes = empty(4, dtype=torch.float32).requires_grad_(), torch.empty(1, 10, dtype=int, device=META)
    with Meter() as meter:
        control(delta, delta, directions, scales, classes).sum().backward()
    assert sum(meter.flops.values()) == 7 * 2 * 10 * 64 * 4 * summands


def test_vectors() -> None:
    with Meter() as meter:
        empty(8, 16) @ empty(16)
        empty(16).dot(empty(16))
        torch.addmv(empty(8), empty(8, 16), empty(16))
    assert meter.flops == {2: 2 * 2 * 8 * 16 + 2 * 16}


LIBRARY = torch.library.Library("plan_test", "FRAGMENT")
LIBRARY.define("mystery(Tensor x) -> Tensor")


@torch.library.impl(LIBRARY, "mystery", "CompositeExplicitAutograd")
def _mystery(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_a_product_without_a_formula_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Meter(), pytest.raises(UnknownProductError, match="plan_test::mystery is not known"):
        torch.ops.plan_test.mystery(empty(4))
    monkeypatch.delitem(FORMULAS, "aten::_grouped_mm")
    with Meter(), pytest.raises(UnknownProductError, match="aten::_grouped_mm"):
        torch._grouped_mm(empty(24, 16), empty(3, 16, 32), offs=bounds(3))
    for unknown in (
        lambda: torch._int_mm(torch.empty(32, 32, dtype=torch.int8), torch.empty(32, 32, dtype=torch.int8)),
        lambda: torch.linalg.svd(torch.ones(4, 4)),
    ):
        with Meter("cpu"), pytest.raises(UnknownProductError):
            unknown()


def test_what_is_entered_is_counted_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMULAS, "plan_test::mystery", lambda x: 5.0 * x.numel())
    with Meter() as meter:
        torch.ops.plan_test.mystery(empty(4))
    assert meter.flops == {2: 20.0}
    monkeypatch.delitem(FORMULAS, "plan_test::mystery")
    monkeypatch.setattr("lightning_pipelite.planning.products.NO_PRODUCTS", {*NO_PRODUCTS, "plan_test::mystery"})
    with Meter() as meter:
        torch.ops.plan_test.mystery(empty(4))
    assert not meter.flops
    assert meter.moved == 2 * 4 * 2


def test_what_lies_between_products_is_let_through() -> None:
    layer = nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.Softmax(-1), nn.Dropout()).to(META, torch.bfloat16)
    with Meter() as meter:
        layer(empty(4, 16)).digamma().norm(dim=-1).cumsum(0).addcmul(empty(4), empty(4)).sum().backward()
    assert not meter.flops


def test_a_kernel_that_casts_to_fp8_reads_a_tensor_and_makes_two_also_in_a_compiled_layer() -> None:
    width = WIDEST + 16
    given = empty(64, width)
    with Meter() as meter:
        meter.fused = True
        meter.hold(given)
        before = meter.live
        kept = cast_rows(given.tanh())
    tanh, codes, scales = 2 * 64 * width, 64 * width, 4 * 64
    assert meter.peak - before == tanh + codes + -(-scales // BLOCK) * BLOCK
    assert [each.shape for each in kept] == [(64, width), (64,)]
