"""Only the text model of a multimodal checkpoint is loaded, and it equals the whole model on text input."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from lightning_pipelite.adapters import Full
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.models import CausalLMLayers
from tiny_models import CPU, SIZES, micro_batches, run_stages

PATCHES = {"image_size": 32, "patch_size": 8}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "gemma3": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(
            **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        vision_config=SiglipVisionConfig(**VISION, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=MistralConfig(**SIZES), vision_config=PixtralVisionConfig(**VISION, image_size=28, patch_size=14)
    ),
    "idefics3": lambda: Idefics3Config(
        text_config=LlamaConfig(**SIZES), vision_config={**VISION, **PATCHES}, image_token_id=5, pad_token_id=0
    ),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=LlamaConfig(**SIZES), vision_config={**VISION, **PATCHES}, image_token_id=5, pad_token_id=0
    ),
}


@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, "new") for kind in CONFIGS), ("gemma3", "old"), ("mistral3", "old")]
)
def test_text_model_of_a_multimodal_checkpoint(tmp_path: Path, kind: str, names: str) -> None:
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    for parameter in whole.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    whole.save_pretrained(tmp_path)
    if kind in ("mistral3", "smolvlm") and names == "new":
        assert not check_model(tmp_path, (2,)).differences
    if names == "old":
        weights = load_file(tmp_path / "model.safetensors")
        renamed = {}
        for name, weight in weights.items():
            if name.startswith("model.language_model."):
                name = "language_model.model." + name.removeprefix("model.language_model.")
            renamed["language_model." + name if name.startswith("lm_head.") else name] = weight
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full())
    stages = [layers.build_stage(start, stop, CPU).eval() for start, stop in itertools.pairwise([0, 2, 4])]
    assert not any("vision" in name or "projector" in name for stage in stages for name, _ in stage.named_parameters())
    (input_ids, _), _ = micro_batches()
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        expected = whole(input_ids=input_ids).logits
        torch.testing.assert_close(run_stages(stages, input_ids, positions), expected, rtol=0, atol=1e-5)
    layers.adapter.save(tmp_path / "saved", (layers.trained_state(stage) for stage in stages), tmp_path)
    saved, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(saved.eval()(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)
