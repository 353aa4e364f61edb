from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_pipelite.adapters.fused_lora import _FusedLoRA, fuse


def adapted(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer of PEFT, and one of the same values that was to be fused."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6))
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], **options), model)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        pair.append(model)
    fuse({"0": pair[1][0]}, "default", [])
    return pair[0], pair[1]


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False), ({"bias": "all"}, False)],
    ids=str,
)
def test_what_is_not_covered_is_left_to_peft(options: dict[str, Any], fused: bool) -> None:
    theirs, ours = adapted(**options)
    assert isinstance(ours[0], _FusedLoRA) == fused
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (theirs, ours):
        model(x).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
