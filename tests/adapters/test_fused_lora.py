from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lightning_pipelite.adapters import fused_lora
from lightning_pipelite.adapters.fused_lora import _FusedLoRA, fuse
from lightning_pipelite.kernels.lora import lora_linear


def adapted(**options: Any) -> tuple[nn.Module, nn.Module]:
    """Return a layer of PEFT, and one with the same values that :func:`fuse` was called on."""
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


def test_a_merge_that_fails_halfway_is_no_surprise() -> None:
    theirs, ours = adapted()
    for model in (theirs, ours):
        layer = model[0]
        layer.update_layer("broken", 2, lora_alpha=2, config=LoraConfig(r=2))
        layer.lora_B["broken"].weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaNs"):
            layer.merge(safe_merge=True, adapter_names=["default", "broken"])
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


class Heads(nn.Module):
    """Query, key and value in nf4."""

    def __init__(self, nested: bool, unit: int) -> None:
        super().__init__()
        for name, width in (("q", 2 * unit), ("k", unit), ("v", unit)):
            layer = Linear4bit(64, width, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
            layer.load_state_dict({"weight": torch.randn(width, 64) / 8, "bias": torch.randn(width)})
            setattr(self, name, layer.to("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


# Quantised scales have one scale per 256 of them, each of which is for 64 weights.
@pytest.mark.parametrize(
    ("nested", "unit", "change"),
    [
        *((False, 3, change) for change in ("", "many", "rank")),
        *((True, 256, change) for change in ("", "many", "rank", "odd", "table")),
    ],
)
def test_small_weights_in_four_bits_are_computed_with_at_once(
    nested: bool, unit: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit += change == "odd"
    most = 4 * unit * 64 - (change == "many")
    ranks = {"q": 8} if change == "rank" else {}
    counts = []

    def counted(x: Tensor, weights: Any, *rest: Any, **named: Any) -> list[Tensor]:
        counts.append(len(weights))
        return lora_linear(x, weights, *rest, **named)

    monkeypatch.setattr(fused_lora, "_SMALL", most)
    monkeypatch.setattr(fused_lora, "lora_linear", counted)
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Heads(nested, unit)
        if change == "table":
            state: Any = model.k.weight.quant_state
            state.state2.code = state.state2.code * 0.5
        inject_adapter_in_model(LoraConfig(r=4, rank_pattern=ranks, target_modules=["q", "k", "v"]), model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        pair.append(model)
    theirs, ours = pair
    fuse({name: getattr(ours, name) for name in ("q", "k", "v")}, "default", [["q", "k", "v"]])
    x = torch.randn(5, 64)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=2e-5)
    assert counts == [3 if change else 1]
    for model in (theirs, ours):
        model(x).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if "lora_" in name:
            torch.testing.assert_close(a.grad, b.grad, atol=2e-3, rtol=1e-4)


def test_merged_and_switched_off_adapters_are_pefts() -> None:
    theirs, ours = adapted()
    x = torch.randn(3, 8)
    steps: list[Any] = [
        lambda layer: layer.merge(),
        lambda layer: layer.unmerge(),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
    ]
    for step in steps:
        for model in (theirs, ours):
            step(model[0])
            for parameter in model[0].base_layer.parameters():
                parameter.requires_grad_(False)
        torch.testing.assert_close(ours(x), theirs(x))


def test_weights_in_four_bits_that_have_moved_are_computed_with() -> None:
    """Zeroing them afterwards zeroes their products, so no stale copies are used."""
    model = Heads(False, 3)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q", "k", "v"]), model)
    fuse({name: getattr(model, name) for name in ("q", "k", "v")}, "default", [["q", "k", "v"]])
    joined: Any = model.q._joined
    model.to("cpu")  # no move, as they are there already
    assert model.q._joined is joined
    x = torch.randn(5, 64)
    before = model(x)
    model._apply(lambda tensor: tensor.clone())
    torch.testing.assert_close(model(x), before, atol=2e-5, rtol=2e-5)
    for layer in (model.q, model.k, model.v):
        weight: Any = layer.get_base_layer().weight  # type: ignore[operator]
        weight.data.fill_(0x77)  # zeros
    biases = torch.cat([layer.get_base_layer().bias for layer in (model.q, model.k, model.v)])  # type: ignore[operator]
    torch.testing.assert_close(model(x), biases.expand(5, -1))
