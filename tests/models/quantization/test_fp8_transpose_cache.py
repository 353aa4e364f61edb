"""Transposed copies of weights in FP8 change no gradient, and are those of the weights that are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipelite.adapters import ControlAdapter, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.quantization import fp8
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from tiny_models import CPU, build, classes_for, give_b_values, train_stages
from tiny_models import write_model as write


def layers_of(directory: Path, adapter: Any, **options: Any) -> CausalLMLayers:
    return CausalLMLayers(directory, adapter=adapter, **{"load_in_fp8": True, **options})


@pytest.mark.parametrize(
    ("adapter", "apart"),
    [(LoRA(4), False), (LoRA(4), True), (ControlAdapter(4), False)],
    ids=["LoRA", "LoRA with scales that differ", "ControlAdapter"],
)
def test_transposed_copies_change_nothing_and_are_used(
    tmp_path: Path, adapter: Any, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    write(tmp_path, "llama")

    def run(cache: bool, spoil: bool = False) -> dict[str, Tensor]:
        stages = build(layers_of(tmp_path, adapter, fp8_transpose_cache=cache), [0, 2, 4])
        give_b_values(stages)
        for name, module in (each for stage in stages for each in stage.named_modules()):
            if apart and name.endswith("k_proj"):
                module.scaling["default"] *= 2
        held = [m for stage in stages for m in stage.modules() if isinstance(m, Fp8Linear)]
        assert all((len(layer.parts()) == 3) == cache for layer in held)
        assert not cache or all(torch.equal(layer.parts()[2].float().T, layer.parts()[0].float()) for layer in held)
        copies = [buffer for stage in stages for name, buffer in stage.named_buffers() if "transposed_codes" in name]
        assert sum(copy.numel() for copy in copies) == cache * sum(layer.codes.numel() for layer in held)
        assert not any("transposed_codes" in name for stage in stages for name in stage.state_dict())
        if spoil:
            for copy in copies:
                copy.zero_()
        return train_stages(stages, classes=classes_for(adapter))[1]

    expected, found, spoilt = run(False), run(True), run(True, spoil=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items())
    assert any(not torch.equal(gradient, spoilt[name]) for name, gradient in expected.items())


def test_a_weight_that_is_quantised_anew_replaces_its_transposed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    layers = [Fp8Linear(nn.Linear(32, 16, bias=False, device="meta"), "layer", torch.bfloat16, CPU) for _ in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(torch.randn(16, 32))
    fp8.join(layers)
    fp8.cache_transposes(nn.Sequential(*layers))
    layers[1].weight = nn.Parameter(torch.randn(16, 32))
    for layer in layers:
        codes, _, cached = layer.parts()
        assert torch.equal(cached.float().T, codes.float())


@pytest.mark.parametrize("assign", [False, True])
def test_a_weight_that_is_loaded_replaces_its_transposed_copy(assign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    models = []
    for _ in range(2):
        layer = Fp8Linear(nn.Linear(32, 16, bias=False, device="meta"), "layer", torch.bfloat16, CPU)
        layer.weight = nn.Parameter(torch.randn(16, 32))
        models.append(nn.Sequential(layer))
        fp8.cache_transposes(models[-1])
    models[0].load_state_dict(models[1].state_dict(), assign=assign)
    found, wanted = (model[0].parts() for model in models)
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(found, wanted, strict=True))


def test_transposed_copies_without_products_in_fp8_are_refused_or_told(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    with pytest.warns(UserWarning, match=r"does not support .* fp8_transpose_cache keeps no transposed copies of them"):
        stage = layers_of(tmp_path, LoRA(4), fp8_transpose_cache=True).build_stage(0, 1, CPU)
    assert not any("transposed_codes" in name for name, _ in stage.named_buffers())
    with pytest.raises(ConfigurationError, match="fp8_transpose_cache applies to weights in FP8; set it to false"):
        layers_of(tmp_path, LoRA(4), load_in_fp8=False, fp8_transpose_cache=True)
