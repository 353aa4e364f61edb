"""A text model without its own causal LM class is the whole model without towers, and is saved as a part of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.merging import merge
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stored.known import stored_format
from quantised_files import edit_config, fp8
from tiny_models import CPU, SIZES, micro_batches, run_stages

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "qwen2_5_vl": ({"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}, QWEN_VISION),
    "glm4v": (
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}, "pad_token_id": 0},
        {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
    ),
    "glm4v_moe": (
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
            "pad_token_id": 0,
        },
        {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
    ),
    "cohere2_vision": (
        {"model_type": "cohere2", "sliding_window": 4, "logit_scale": 0.25},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}
POSITIONS = torch.arange(12).expand(2, -1)


def whole_model(directory: Path, kind: str) -> PreTrainedModel:
    """Save a whole model, including its towers, with random weights, and return it."""
    text, vision = KINDS[kind]
    config = CONFIG_MAPPING[kind](text_config={**SIZES, **text}, vision_config=vision)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in whole.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    whole.save_pretrained(directory)
    return whole


def stages_of(layers: CausalLMLayers) -> list[Any]:
    return [layers.build_stage(start, stop, CPU).eval() for start, stop in itertools.pairwise([0, 2, 4])]


@torch.no_grad()
def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp(min=1)))


@pytest.mark.parametrize("kind", KINDS)
def test_stages_equal_the_whole_model_given_text(tmp_path: Path, kind: str) -> None:
    whole = whole_model(tmp_path / "base", kind)
    layers = CausalLMLayers(tmp_path / "base", dtype=torch.float32, adapter=Full())
    assert layers.meta_model.isolates_documents
    stages = stages_of(layers)
    assert not any("visual" in name or "vision" in name for stage in stages for name, _ in stage.named_parameters())
    (input_ids, _), _ = micro_batches()
    with torch.no_grad():  # the whole model computes positions itself, in three dimensions where there are images
        expected = whole(input_ids=input_ids).logits
        assert_same(run_stages(stages, input_ids, POSITIONS), expected)
    before = load_file(tmp_path / "base" / "model.safetensors")
    stages[0].causal_lm.get_submodule(layers.meta_model.layers_name)[0].input_layernorm.weight.data += 1.0
    layers.adapter.save(tmp_path / "saved", (layers.trained_state(stage) for stage in stages), tmp_path / "base")
    saved, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        changed = run_stages(stages, input_ids, POSITIONS)
        assert not torch.allclose(changed, expected, atol=1e-3)
        assert_same(saved.eval()(input_ids=input_ids).logits, changed)
    after = {n: t for path in (tmp_path / "saved").glob("*.safetensors") for n, t in load_file(path).items()}
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert sum(not torch.equal(after[name], before[name]) for name in before) == 1


@pytest.mark.parametrize("kind", ["qwen3_vl", "glm4v_moe"])
def test_an_adapter_is_the_whole_models(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    whole = whole_model(base, kind)
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=LoRA(rank=2, target_modules=["q_proj", "o_proj"]))
    stages = stages_of(layers)
    generator = torch.Generator().manual_seed(0)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    layers.adapter.save(tmp_path / "adapter", (layers.trained_state(stage) for stage in stages), base)
    (input_ids, _), _ = micro_batches()
    with torch.no_grad():
        trained = run_stages(stages, input_ids, POSITIONS)
        assert not torch.allclose(trained, whole(input_ids=input_ids).logits, atol=1e-3)
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert_same(merged(input_ids=input_ids).logits, trained)
        adapted = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
        assert not any("visual" in name for name, _ in adapted.named_parameters() if "lora_" in name)
        assert_same(adapted(input_ids=input_ids).logits, trained)


def test_files_quantised_by_the_text_models_word_are_saved_in_plain(tmp_path: Path) -> None:
    base = tmp_path / "base"
    whole_model(base, "qwen2_5_vl")
    tensors, described = fp8()(load_file(base / "model.safetensors"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((base / "config.json").read_text())["text_config"]
    edit_config(base, text_config={**text, "quantization_config": described})
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=Full())
    stages = stages_of(layers)
    layers.adapter.save(tmp_path / "saved", (layers.trained_state(stage) for stage in stages), base)
    (input_ids, _), _ = micro_batches()
    saved = CausalLMLayers(tmp_path / "saved", dtype=torch.float32, adapter=Full())
    assert stored_format(tmp_path / "saved") is None
    assert_same(run_stages(stages_of(saved), input_ids, POSITIONS), run_stages(stages, input_ids, POSITIONS))


def test_check_of_a_tiny_one(tmp_path: Path) -> None:
    whole_model(tmp_path, "qwen3_vl")
    report = check_model(tmp_path, (1, 2, 4), tiny=True)
    assert (report.differences, report.packing) == ([], True)


def test_what_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["paligemma"](text_config={"model_type": "gemma", **SIZES}, vision_config=vision)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="its tokens attend to later tokens"):
        MetaModel(tmp_path)


def test_what_cannot_do_without_images_is_refused(tmp_path: Path) -> None:
    sizes = {"layers": 2, "embed_dim": 64, "attention_heads": 4, "ffn_dim": 128, "vocab_size": 128}
    CONFIG_MAPPING["kosmos-2"](text_config=sizes).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="pixel_values"):
        MetaModel(tmp_path)


def test_towers_are_not_built(tmp_path: Path) -> None:
    whole_model(tmp_path, "cohere2_vision")
    model = MetaModel(tmp_path).model
    assert [name for name, module in model.named_modules() if type(module).__name__ == "LeftOut"] == [
        "model.vision_tower",
        "model.multi_modal_projector",
    ]
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name, _ in model.named_parameters())
