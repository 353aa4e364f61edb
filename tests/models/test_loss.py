"""The loss of a micro-batch equals small examples computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_pipelite.models.head import HeadInputs
from lightning_pipelite.models.loss import CausalLMLoss

# The softmax of two logits that differ by log(3) is 3/4 and 1/4.
LOGITS = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0]], [[0.0, math.log(3)], [0.0, 0.0]]])
LABELS = torch.tensor([[1, 1], [-100, 0]])
TOTAL = -math.log(3 / 4) - math.log(1 / 4) - math.log(1 / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_of_what_has_a_label(dtype: torch.dtype) -> None:
    total, count = CausalLMLoss()(LOGITS.to(dtype), LABELS)
    assert (total.dtype, count) == (torch.float32, 3)
    exact = LOGITS.to(dtype).double().log_softmax(-1)
    assert float(total) == pytest.approx(float(-exact[0, 0, 1] - exact[0, 1, 1] - exact[1, 1, 0]), rel=1e-6)
    assert float(total) == pytest.approx(TOTAL, rel=1e-6 if dtype == torch.float32 else 4e-3)


def test_the_loss_of_routers_counts_by_tokens() -> None:
    loss = CausalLMLoss(0.5)
    assert loss.logged == ("router_aux_loss",)
    balance = torch.tensor(7.0, requires_grad=True)
    total, count, logged = loss((LOGITS, balance), LABELS)
    assert (count, logged) == (3, 21)
    assert float(total.detach()) == pytest.approx(TOTAL + 0.5 * 21, rel=1e-6)
    total.backward()
    assert balance.grad == 0.5 * 3
    total, count, logged = loss(LOGITS, LABELS)  # in evaluation
    assert (count, logged) == (3, 0)
    assert float(total) == pytest.approx(TOTAL, rel=1e-6)


@pytest.mark.parametrize("routers", [False, True])
def test_what_a_head_hands_over_is_all_computed_with(routers: bool) -> None:
    """The logits are 2 tanh(3 (h W^T + b) / 2), where the second row of W is replaced."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 2, 4), torch.randn(5, 4), torch.randn(5)
    row = torch.randn(1, 4)
    whole = torch.cat([weight[:1], row, weight[2:]])
    logits = 2 * torch.tanh(3 * (hidden @ whole.T + bias) / 2)
    log_probabilities = logits.log_softmax(-1)
    exact = float(-log_probabilities[0, 0, 1] - log_probabilities[0, 1, 1] - log_probabilities[1, 1, 0])
    inputs = HeadInputs(hidden, weight, bias, 3.0, 2.0, (torch.tensor([1]), row))
    outputs = (inputs, torch.tensor(7.0)) if routers else inputs
    total, count, *logged = CausalLMLoss(0.5 if routers else 0.0)(outputs, LABELS)
    assert count == 3
    assert float(total) == pytest.approx(exact + (0.5 * 21 if routers else 0), rel=1e-5)
    assert logged == ([21] if routers else [])
