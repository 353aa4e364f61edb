"""A multimodal base's adapter has the names that PEFT looks for in the model that the base's directory loads as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_text_part import CONFIGS, SIZES
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    Qwen2AudioConfig,
    Qwen2Config,
)

from lightning_pipelite.adapters import Adapter, ControlAdapter, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import analyze, control_to_lora, export_gguf, merge
from lightning_pipelite.models import CausalLMLayers
from tiny_models import CPU, micro_batches, run_stages

BASES: dict[str, Callable[[], PretrainedConfig]] = {
    **CONFIGS,  # gemma3 is known to AutoModelForCausalLM, mistral3 is not
    "qwen2_audio": lambda: Qwen2AudioConfig(  # audio; known to AutoModelForMultimodalLM alone
        text_config=Qwen2Config(**SIZES),
        audio_config={"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        audio_token_index=127,
    ),
}
(INPUT_IDS, _), _ = micro_batches()
POSITIONS = torch.arange(12).expand(2, -1)


def write_base(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = BASES[kind]()
    _auto_class(config).from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def load(directory: Path) -> Any:
    auto = _auto_class(AutoConfig.from_pretrained(directory))
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def _auto_class(config: PretrainedConfig) -> Any:
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    return next(auto for auto in autos if type(config) in auto._model_mapping)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=INPUT_IDS).logits


@torch.no_grad()
def train(base: Path, adapter: Adapter, saved: Path) -> Tensor:
    """Save a random adapter; return the logits that it gives."""
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=adapter)
    stage = layers.build_stage(0, len(layers), CPU).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in stage.parameters() if p.requires_grad):
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save(saved, [layers.trained_state(stage)], layers.meta_model)
    extra = [torch.ones_like(INPUT_IDS)] if isinstance(adapter, ControlAdapter) else []
    return run_stages([stage], INPUT_IDS, POSITIONS, *extra)


def as_text_model(adapter: Path, target: Path) -> Path:
    """Write an adapter in the former format, with the names of the text model alone."""
    target.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    short = {f"base_model.model.model.layers.{key.partition('.layers.')[2]}": each for key, each in tensors.items()}
    assert short.keys().isdisjoint(tensors)
    save_file(short, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    if "target_modules" in config:
        config["target_modules"] = [name.rpartition(".")[2] for name in config["target_modules"]]
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", list(BASES))
def test_peft_gives_what_was_trained_and_a_merge_of_either_form(tmp_path: Path, kind: str) -> None:
    base = write_base(tmp_path / "base", kind)
    expected = train(base, LoRA(2), tmp_path / "adapter")
    plain = logits(load(base))
    assert (expected - plain).abs().max() > 0.01
    whole = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert not any("vision" in name or "audio" in name for name, _ in whole.named_parameters() if "lora_" in name)
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-5)
    for adapter in (tmp_path / "adapter", as_text_model(tmp_path / "adapter", tmp_path / "former")):
        merge(str(base), str(adapter), str(tmp_path / f"{adapter.name}-merged"))
        torch.testing.assert_close(logits(load(tmp_path / f"{adapter.name}-merged")), expected, rtol=0, atol=1e-5)


def test_gguf_and_analysis_read_both_forms(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gemma3")
    train(base, LoRA(2), tmp_path / "adapter")
    as_text_model(tmp_path / "adapter", tmp_path / "former")
    written, figures = [], []
    for name in ("adapter", "former"):
        export_gguf(str(tmp_path / name), str(base), str(tmp_path / f"{name}.gguf"))
        written.append({each.name: each.data.tobytes() for each in GGUFReader(tmp_path / f"{name}.gguf").tensors})
        analyze(str(tmp_path / name), str(base), str(tmp_path / f"{name}-analysis"))
        figures.append(json.loads((tmp_path / f"{name}-analysis" / "analysis.json").read_text()))
    assert written[0] == written[1]
    assert figures[0] == figures[1]
    assert len(written[0]) == 2 * len(figures[0]["figures"]) == 2 * 4 * 7


def test_the_lora_of_a_control_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "mistral3")
    train(base, ControlAdapter(2), tmp_path / "control")
    as_text_model(tmp_path / "control", tmp_path / "former")
    results = []
    for name in ("control", "former"):
        control_to_lora(str(base), str(tmp_path / name), str(tmp_path / f"{name}-lora"), writers="all")
        results.append(logits(PeftModel.from_pretrained(load(base), tmp_path / f"{name}-lora")))
    assert torch.equal(*results)
    assert (results[0] - logits(load(base))).abs().max() > 1e-3
    # Code that applies it by hooks finds the layers in the model that the directory loads as.
    for key in load_file(tmp_path / "control" / "adapter_model.safetensors"):
        load(base).get_submodule(key.removeprefix("base_model.model.").rpartition(".")[0])


def test_an_adapter_of_the_images_too_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gemma3")
    train(base, LoRA(2), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj"]}))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    names = [name for name, _ in load(base).named_parameters() if name.endswith("q_proj.weight") and "vision" in name]
    vision = f"base_model.model.{names[0].removesuffix('.weight')}"
    tensors |= {f"{vision}.lora_A.weight": torch.ones(2, 32), f"{vision}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="not part of the text model"):
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
