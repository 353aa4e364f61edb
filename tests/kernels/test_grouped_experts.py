"""Grouped products equal each expert run separately in float64, natively and under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.kernels.combine import sum_copies
from lightning_pipelite.kernels.experts import Factors, Matrices, experts_in, experts_out, experts_reference
from lightning_pipelite.kernels.groups import Groups
from lightning_pipelite.kernels.nf4 import bitsandbytes_operations
from lightning_pipelite.kernels.routing import sort_by_expert

native = pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="native")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
if INTERPRETED:
    del ROUNDING[torch.bfloat16]  # the interpreter multiplies its bits instead of its values
NARROW = list(ROUNDING)[-1]
COMPILED: list[dict[str, Any]] = [{}, {"double": True}, {"transposed": True, "rank": 20}, {"rank": 0}]
if INTERPRETED:
    del COMPILED[1:]  # the code compiled around the kernels is the same without the interpreter
TOKENS, EXPERTS, HIDDEN, INNER = 40, 5, 64, 96


@pytest.mark.slow
@native
def test_under_the_interpreter() -> None:
    pass_interpreted(__file__)


def swiglu(values: Tensor) -> Tensor:
    gate, up = values.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class Case:
    """Random experts, and their results in float64."""

    def __init__(
        self, device: str, dtype: torch.dtype, chosen: Tensor, *,
        rank: int = 4, transposed: bool = False, biased: bool = False, scale: float = 1.0, double: bool | None = None,
        exact_scores: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.device, self.dtype, self.chosen, self.scale, self.rank = device, dtype, chosen, scale, rank
        self.x = draw(len(chosen), HIDDEN).to(dtype)
        self.scores = draw(*chosen.shape).softmax(-1).to(torch.float32 if exact_scores else dtype)
        self.back = draw(len(chosen), HIDDEN).to(dtype)
        self.given, self.whole, self.factors = [], [], []
        for inner, outer in ((HIDDEN, 2 * INNER), (INNER, HIDDEN)):
            shape = (EXPERTS, inner, outer) if transposed else (EXPERTS, outer, inner)
            weight = (draw(*shape) / inner**0.5).to(dtype)
            bias = draw(EXPERTS, outer).to(dtype) if biased else None
            parts = [weight.to(device)]
            if double is not None:
                bitsandbytes_operations()  # corrects the reference, bitsandbytes' dequantisation, on CPUs
                codes, state = quantize_4bit(
                    weight.to(device), blocksize=64, compress_statistics=double, quant_type="nf4"
                )
                weight = dequantize_4bit(codes, state).cpu()
                parts = [codes, state.absmax]
                parts += [state.state2.absmax, state.state2.code, state.offset] if double else []
            self.given.append(Matrices(parts, shape, transposed, None if bias is None else bias.to(device)))
            exact = None if bias is None else bias.double()
            self.whole.append(Matrices([weight.double()], shape, transposed, exact))
            # B has PEFT's layout, [out, rank, experts].
            self.factors += [draw(EXPERTS, rank, inner) / inner**0.5, draw(outer, rank, EXPERTS) / rank**0.5]

    def wanted(self) -> list[Tensor]:
        leaves = [t.detach().double().requires_grad_() for t in (self.x, self.scores, *self.factors)]
        x, scores, a1, b1, a2, b2 = leaves
        factors = [Factors(a, b.permute(2, 0, 1), self.scale) if self.rank else None for a, b in ((a1, b1), (a2, b2))]
        out = experts_reference(x, self.chosen, scores, *self.whole, swiglu, *factors)
        return [out.detach(), *self._gradients(out, leaves, self.back.double())]

    def found(self, run: Any = None) -> list[Tensor]:
        leaves = [t.detach().to(self.device).requires_grad_() for t in (self.x, self.scores, *self.factors)]
        out = (run or self.ours)(*leaves)
        assert out.dtype == self.dtype
        found = [out.detach(), *self._gradients(out, leaves, self.back.to(self.device))]
        assert [t.dtype for t in found[3:]] == [torch.float32] * (4 if self.rank else 0)
        return found

    def ours(self, x: Tensor, scores: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        groups = sort_by_expert(self.chosen.to(self.device), EXPERTS)
        factors = [Factors(a, b.permute(2, 0, 1), self.scale) if self.rank else None for a, b in ((a1, b1), (a2, b2))]
        y = swiglu(experts_in(x, groups, self.given[0], factors[0]))
        return experts_out(y, scores, self.chosen.to(self.device), groups, self.given[1], factors[1])

    def _gradients(self, out: Tensor, leaves: list[Tensor], back: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, leaves if self.rank else leaves[:2], back))

    def check(self, run: Any = None) -> None:
        for number, (ours, exact) in enumerate(zip(self.found(run), self.wanted(), strict=True)):
            error = float((ours.cpu().double() - exact).norm() / exact.norm())
            assert error < ROUNDING[self.dtype], (number, error)


def choices(copies: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(copies)
    return torch.rand(tokens, EXPERTS, generator=generator).topk(copies, dim=-1).indices


ROUTINGS = {
    "top 1": choices(1),
    "top 2": choices(2),
    "top 5": choices(5),
    "one has all": torch.full((TOKENS, 1), 3),
    "the ends have none": 1 + choices(2)[:, :1] % 3,
    "many tokens": choices(2, 150),
    "one token": choices(2, 1),
}
# The interpreter takes seconds a case, and routing does not affect precision: one routing covers the other dtypes.
ROUTED = [
    (routing, dtype)
    for routing in ROUTINGS
    for dtype in ROUNDING
    if not INTERPRETED or dtype == NARROW or routing == "top 2"
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("routing", "dtype"), ROUTED)
def test_equals_float64(device: str, dtype: torch.dtype, routing: str) -> None:
    Case(device, dtype, ROUTINGS[routing]).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [NARROW] if INTERPRETED else ROUNDING, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"transposed": True},
        {"biased": True},
        {"biased": True, "transposed": True, "exact_scores": True},
        {"rank": 0, "biased": True},
        {"rank": 3, "scale": 0.5},
        {"rank": 80, "scale": 2.0},
    ],
    ids=str,
)
def test_layouts_biases_and_ranks(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    Case(device, dtype, choices(2), **options).check()


@pytest.mark.parametrize("device", DEVICES)
def test_scores_alone_have_a_gradient(device: str) -> None:
    """As for a router above frozen layers. The gradient from the sum is one expanded number, not contiguous."""
    case = Case(device, torch.float32, choices(2).int(), rank=0, biased=True)
    exact, scores = case.scores.double().requires_grad_(), case.scores.to(device).requires_grad_()
    chosen = case.chosen.to(device)
    groups = sort_by_expert(chosen, EXPERTS)
    inner = swiglu(experts_in(case.x.to(device), groups, case.given[0]))
    experts_out(inner, scores, chosen, groups, case.given[1]).sum().backward()
    experts_reference(case.x.double(), case.chosen, exact, *case.whole, swiglu).sum().backward()
    assert float((scores.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()) < ROUNDING[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_in_4_bits(device: str, double: bool, transposed: bool) -> None:
    Case(device, NARROW, choices(2), double=double, transposed=transposed).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("experts", "copies", "tokens"), [(1, 1, 7), (3, 2, 300), (128, 8, 200), (200, 5, 130)])
def test_sorting(device: str, experts: int, copies: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).square().topk(copies, dim=-1).indices
    groups = Groups(*(tensor.cpu() for tensor in sort_by_expert(chosen.to(device), experts)))
    order = chosen.flatten().argsort(stable=True)
    assert torch.equal(groups.order.long(), order)
    assert torch.equal(groups.places.flatten().long()[order], torch.arange(tokens * copies))
    lengths = chosen.flatten().bincount(minlength=experts)
    assert groups.bounds.tolist() == [0, *lengths.cumsum(0).tolist()]
    seen = torch.zeros(tokens * copies, dtype=torch.int64)
    block = max(16, 1 << (tokens * copies // experts - 1).bit_length()) if tokens * copies > experts else 16
    for group, first in groups.tiles.T.tolist():
        if group >= 0:
            seen[first : min(first + min(block, 128), int(groups.bounds[group + 1]))] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("device", DEVICES)
def test_an_expert_that_there_is_not(device: str) -> None:
    chosen = torch.tensor([[0, 1], [0, 5], [2, 1], [-1, 3]], device=device)
    if device == "cpu" and not INTERPRETED:
        with pytest.raises(IndexError, match="a router chose an expert that does not exist"):
            sort_by_expert(chosen, 5)
        return
    groups = sort_by_expert(chosen, 5)
    out = sum_copies(torch.ones(8, 16, device=device), groups)
    assert out.isnan().any(1).tolist() == [False, True, False, True]
    assert sorted(groups.order.tolist()) == [*range(8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiled_once_whatever_the_routing(device: str, options: dict[str, Any]) -> None:
    import torch._dynamo.testing as testing

    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager_decomp_partition"
    counter = testing.CompileCounterWithBackend(backend)
    case = Case(device, NARROW, choices(2), biased=True, **options)
    compiled = torch.compile(case.ours, backend=counter, fullgraph=True)
    for shift in (0, 1):
        case.chosen = (choices(2) + shift) % EXPERTS
        case.check(compiled)
    assert counter.frame_count == 1
