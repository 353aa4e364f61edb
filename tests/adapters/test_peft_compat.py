"""Canaries for the undocumented parts of PEFT that are used here. A failure says which one changed."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

PACKAGE = Path(__file__).parents[2] / "lightning_pipelite"
EXPORTED = {"peft", "peft.tuners.lora", "peft.utils"}


@pytest.mark.parametrize(
    ("module", "name", "used_for"),
    [
        ("peft.utils.other", "get_pattern_key", "analyze reads rank_pattern and alpha_pattern"),
        (
            "peft.tuners.lora",
            "LoraLayer._move_adapter_to_device_of_base_layer",
            "merge reads an adapter on a meta base",
        ),
        ("peft.tuners.lora", "ParamWrapper._activate_lora", "LoRA on experts in 4 bits trains"),
        ("peft.tuners.lora", "ParamWrapper.get_param", "LoRA on experts in 4 bits trains"),
        ("peft.tuners.lora", "ParamWrapper.get_delta_factors", "LoRA on experts in 4 bits trains"),
        ("peft.tuners.lora", "LoraLayer._disable_adapters", "layers detect that their adapter is disabled"),
        ("peft.tuners.lora", "Linear.pissa_init", "init_lora_weights pissa"),
        ("peft.tuners.lora.dora", "DoraLinearLayer.update_layer", "use_dora has its magnitudes"),
        ("peft.tuners.lora.variants", "DoraLinearVariant", "norms and decay recognise DoRA by its class name"),
        ("peft.tuners.lora.variants", "ALoraLinearVariant", "norms and decay know aLoRA by its class's name"),
    ],
)
def test_the_name_is_there(module: str, name: str, used_for: str) -> None:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"PEFT no longer has {module}.{name}, which is needed so that {used_for}"
        found = getattr(found, part)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,eio->teo", x, self.weight)


def wrapped() -> tuple[nn.Module, ParamWrapper]:
    model = nn.ModuleDict({"experts": Experts()})
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.weight"]))
    layer = peft.base_model.model["experts"]
    assert isinstance(layer, ParamWrapper)
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor["default"].weight)
    return model, layer


def test_experts_factors_are_laid_out_as_pefts_own_product() -> None:
    from lightning_pipelite.adapters.peft_compat import expert_factors, is_swapped

    _, layer = wrapped()
    assert hasattr(layer, "_did_swap_in_out_features"), "ParamWrapper no longer has _did_swap_in_out_features"
    a, b = expert_factors(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.num_experts)
    product = 3.0 * b @ a
    expected = layer.get_delta_weight("default")
    torch.testing.assert_close(product if is_swapped(layer) else product.mT, expected)


def test_an_adapter_stays_where_it_was_read() -> None:
    from lightning_pipelite.adapters.peft_compat import adapter_stays

    before = LoraLayer._move_adapter_to_device_of_base_layer
    with torch.device("meta"):
        base = nn.Linear(4, 4)
    layer = get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    layer.lora_A["default"].to_empty(device="cpu")
    with adapter_stays():
        layer._move_adapter_to_device_of_base_layer("default")
        assert layer.lora_A["default"].weight.device.type == "cpu"
    assert LoraLayer._move_adapter_to_device_of_base_layer is before
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.lora_A["default"].weight.device.type == "meta"


def test_patterns_are_read_as_peft_reads_them() -> None:
    from lightning_pipelite.adapters.peft_compat import rank_and_alpha

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)}), "ba": nn.Linear(4, 4)})
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["a", "ba"], rank_pattern={"b.a": 3, "^a": 1}, alpha_pattern={"ba": 5}
    )
    peft = get_peft_model(model, config).base_model.model
    for name in ("a", "b.a", "ba"):
        layer = peft.get_submodule(name)
        assert rank_and_alpha(config, name) == (layer.r["default"], layer.lora_alpha["default"]), name


def test_what_is_not_exported_is_imported_in_one_file() -> None:
    found = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        if path.name == "peft_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
                found += [f"{path.relative_to(PACKAGE)}: {node.module}"] * (node.module not in EXPORTED)
    assert found == [], "move these to peft_compat.py"
