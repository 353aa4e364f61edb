"""The kernels equal plain torch in float64; without a GPU, they run under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from interpreter import INTERPRETED, pass_interpreted
from lightning_pipelite.kernels.cross_entropy import cross_entropy_, cross_entropy_reference_
from lightning_pipelite.kernels.linear_cross_entropy import linear_cross_entropy
from lightning_pipelite.kernels.scale import scale_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
native = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run natively")
def test_under_the_interpreter() -> None:
    pass_interpreted(__file__)


def expected(logits, labels, scale, softcap, weights):  # type: ignore[no-untyped-def]
    x = logits.detach().double().requires_grad_()
    z = x * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    kept = labels != -100
    losses = -z.log_softmax(dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * kept
    losses = losses if weights is None else losses * weights.double()
    losses.sum().backward()
    return losses.detach(), x.grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 4096), (4, 1031)])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 0.0, float("nan")])
def test_a_gradient_is_scaled(dtype: torch.dtype, shape: tuple[int, ...], factor: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape, device=DEVICE).to(dtype)
    by = torch.tensor(factor, device=DEVICE)
    expected = (values.float() * by).to(dtype)
    transposed = values.T.contiguous().T if len(shape) == 2 else values.clone()
    assert scale_(transposed, by) is transposed
    rounding = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0  # the interpreter truncates
    torch.testing.assert_close(transposed, expected, rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [pytest.param(cross_entropy_, marks=native), cross_entropy_reference_])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "scale", "softcap", "weighted", "ignored"),
    [
        (5, 17, 1.0, None, False, 0),
        (3, 4096, 0.3, None, True, 1),  # a scale that narrower dtypes would round
        (4, 5000, 1.0, 30.0, False, 2),
        (3, 9001, 2.0, 5.0, True, 3),
        (4, 20_000, 0.5, None, True, 1),
        (2, 262_144, 1.0, None, False, 0),
        (0, 100, 1.0, None, False, 0),
    ],
)
def test_losses_and_gradients(function, dtype, rows, vocabulary, scale, softcap, weighted, ignored) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    padded = (4 * torch.randn(rows, vocabulary + 3, device=DEVICE)).to(dtype)  # rows with a gap between them
    logits = padded[:, :vocabulary]
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    labels[-1:] = vocabulary - 1  # in the last, partial block
    labels[:ignored] = -100
    weights = torch.rand(rows, device=DEVICE).to(dtype) if weighted else None
    losses, gradients = expected(logits, labels, scale, softcap, weights)
    kept = logits.clone()
    options = {"scale": scale, "softcap": softcap, "weights": weights}
    found = function(logits, labels, **options, gradient=False)
    assert torch.equal(logits, kept)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    beyond = padded[:, vocabulary:].clone()
    torch.testing.assert_close(function(logits, labels, **options), found)
    assert torch.equal(padded[:, vocabulary:], beyond)
    torch.testing.assert_close(logits.double(), gradients, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-2)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_references_gradient_is_rounded_once(dtype: torch.dtype, unit: float, weighted: bool) -> None:
    """Neither the scale nor the weights are rounded to the logits' dtype first."""
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 5, device=DEVICE).to(dtype), torch.randint(0, 5, (64,), device=DEVICE)
    weights = (0.5 + torch.rand(64, device=DEVICE)).to(dtype) if weighted else None
    _, gradients = expected(logits, labels, 0.3, None, weights)
    cross_entropy_reference_(logits, labels, scale=0.3, weights=weights)
    torch.testing.assert_close(logits.double(), gradients, rtol=1.001 * unit, atol=0)


@native
def test_a_label_that_is_no_token_is_not_a_number() -> None:
    for label in (17, -1, 2**40):
        assert cross_entropy_(torch.zeros(1, 17, device=DEVICE), torch.tensor([label], device=DEVICE)).isnan().all()


@pytest.mark.parametrize("function", [pytest.param(cross_entropy_, marks=native), cross_entropy_reference_])
def test_extreme_logits(function) -> None:  # type: ignore[no-untyped-def]
    logits = torch.tensor(
        [[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [float("-inf"), 3.0, 1.0], [2e38, -2e38, 3e38]], device=DEVICE
    )
    labels = torch.tensor([0, 1, 2, 2], device=DEVICE)
    losses, gradients = expected(logits, labels, 1.0, None, None)
    torch.testing.assert_close(function(logits, labels).double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [pytest.param(cross_entropy_, marks=native), cross_entropy_reference_])
def test_an_ignored_row_may_hold_anything(function) -> None:  # type: ignore[no-untyped-def]
    logits = torch.tensor([[float("nan"), 1.0, 2.0], [float("-inf"), 1.0, 2.0], [0.0, 1.0, 2.0]], device=DEVICE)
    weights = torch.tensor([float("inf"), 1.0, 0.5], device=DEVICE)
    alone = expected(logits[2:], torch.tensor([1], device=DEVICE), 1.0, None, weights[2:])
    losses = function(logits, torch.tensor([-100, -100, 1], device=DEVICE), weights=weights)
    for found, (wanted, ignored) in zip((losses, logits), zip(alone, ((2,), (2, 3)), strict=True), strict=True):
        zeros = torch.zeros(ignored, device=DEVICE, dtype=torch.float64)
        torch.testing.assert_close(found.double(), torch.cat([zeros, wanted]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [cross_entropy_, cross_entropy_reference_])
def test_labels_for_other_rows_are_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="do not match labels"):
        function(torch.zeros(4, 5), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("function", [cross_entropy_, cross_entropy_reference_])
def test_a_scale_that_turns_logits_round_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must be positive"):
        function(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), scale=-1.0)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not match labels"):
        cross_entropy_(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not match labels"):
        cross_entropy_(torch.zeros(5, 2).T, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="have incompatible shapes"):
        linear_cross_entropy(torch.zeros(2, 5), torch.zeros(7, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_head_and_loss(dtype: torch.dtype, trained: bool, biased: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 16, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(99, 16, device=DEVICE).to(dtype).requires_grad_(trained)
    bias = torch.randn(99, device=DEVICE).to(dtype).requires_grad_(trained) if biased else None
    labels = torch.randint(0, 99, (2, 7), device=DEVICE)
    labels[0, 3] = labels[1, 6] = -100
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    wide = [t.detach().double().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    z = 0.5 * torch.nn.functional.linear(*wide)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum") * 3
    loss.backward()
    total = linear_cross_entropy(
        hidden, weight, labels, bias=bias, scale=0.5, softcap=softcap, max_logits_bytes=3 * 99 * 4
    )
    (3 * total).backward()
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(3 * total.double(), loss.detach(), rtol=tolerance, atol=tolerance)
    for leaf, reference in zip(leaves, [t for t in wide if t is not None], strict=False):
        scale = reference.grad.abs().max()
        torch.testing.assert_close(leaf.grad.double() / scale, reference.grad / scale, rtol=tolerance, atol=tolerance)
    assert trained or weight.grad is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_rows_held_apart(dtype: torch.dtype, biased: bool, softcap: float | None) -> None:
    """They give the results of a weight into which they are written and in which only they have a gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 16, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(99, 16, device=DEVICE).to(dtype)
    bias = torch.randn(99, device=DEVICE).to(dtype) if biased else None
    numbers = torch.tensor([7, 98, 0], device=DEVICE)
    values = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 99, (2, 7), device=DEVICE)
    labels[0, :3], labels[1, 6] = numbers, -100
    wide = [hidden.detach().double().requires_grad_(), values.detach().to(dtype).double().requires_grad_()]
    z = 0.5 * torch.nn.functional.linear(
        wide[0], weight.double().index_copy(0, numbers, wide[1]), None if bias is None else bias.double()
    )
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum") * 3
    loss.backward()
    options = {"bias": bias, "scale": 0.5, "softcap": softcap, "rows": (numbers, values)}
    total = linear_cross_entropy(hidden, weight, labels, **options, max_logits_bytes=3 * 99 * 4)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **options), total)
    (3 * total).backward()
    tolerance = 4 * TOLERANCE[dtype]
    torch.testing.assert_close(3 * total.double(), loss.detach(), rtol=tolerance, atol=tolerance)
    for leaf, reference in zip((hidden, values), wide, strict=True):
        scale = reference.grad.abs().max()
        torch.testing.assert_close(leaf.grad.double() / scale, reference.grad / scale, rtol=tolerance, atol=tolerance)
    assert values.grad.dtype == torch.float32


def test_all_labels_ignored() -> None:
    hidden = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    total = linear_cross_entropy(hidden, torch.randn(9, 8, device=DEVICE), torch.full((4,), -100, device=DEVICE))
    total.backward()
    assert total == 0
    assert not hidden.grad.any()


def test_without_gradients() -> None:
    hidden, weight = torch.randn(4, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE)
    labels = torch.tensor([1, -100, 8, 0], device=DEVICE)
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, labels)
    reference = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(total, reference)


@pytest.mark.parametrize("apart", [False, True])
def test_small_updates_of_a_trained_head_are_not_lost(apart: bool) -> None:
    """A token's share of the head's gradient would be lost if the shares were summed in bf16."""
    hidden = torch.cat([torch.full((1, 8), 64.0), torch.full((512, 8), 2.0**-4)]).to(DEVICE, torch.bfloat16)
    zeros = torch.zeros(2, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    rows = (torch.tensor([0, 1], device=DEVICE), zeros) if apart else None
    weight = zeros.detach() if apart else zeros
    bias = torch.zeros(2, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(513, dtype=torch.int64, device=DEVICE)
    linear_cross_entropy(hidden, weight, labels, bias=bias, rows=rows, max_logits_bytes=4).backward()
    expected_sum = -0.5 * (64 + 512 * 2.0**-4)
    torch.testing.assert_close(zeros.grad[0].float(), torch.full((8,), expected_sum, device=DEVICE), rtol=4e-3, atol=0)
    torch.testing.assert_close(bias.grad.float(), torch.tensor([-256.5, 256.5], device=DEVICE), rtol=4e-3, atol=0)


def test_a_second_backward_pass_is_refused() -> None:
    """The gradients are computed once and scaled in place, so a second pass would scale them again."""
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 8), torch.tensor([0, 4, -100, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass only"):
        loss.backward()
