"""A LoRA that continues from a PEFT adapter starts with what PEFT computes with that adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora_variants import MOE, ROW, four_bit, logits_of
from test_whole_names import as_text_model, load, write_base
from torch import nn
from transformers import AutoModelForCausalLM

from adapter_jobs import MICRO_BATCHES, SCALE, first_step, items
from exact_training import Case, make_model, use_what_codes_stand_for
from lightning_pipelite import PipeLiteModule
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from processes import Workers
from quantised_files import fp8, write_quantised
from tiny_models import CONFIGS, CPU, build, micro_batches, reference, run_stages, write_model

TARGETS = ["q_proj", "down_proj"]


def by_peft(model: Any, directory: Path, **options: Any) -> PeftModel:
    """Save an adapter created by PEFT, with no zeros among its values, and return the adapted model."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **options}))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(directory))
    return adapted


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    by_peft(reference(model_dir), directory)
    return directory


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"use_rslora": True}, {}),
        ({"lora_alpha": 4}, {"use_rslora": True}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"alpha_pattern": {"q_proj": 6}}, {}),
        ({"layers_to_transform": [1, 2]}, {"layers_to_transform": "1:2"}),
        ({}, {"load_in_4bit": True}),
        ({}, {"load_in_fp8": True}),
    ],
    ids=str,
)
def test_starts_as_peft_has_it(model_dir: Path, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    held = {name: value for name, value in ours.items() if name.startswith("load_in_")}
    whole: Any = reference(model_dir)
    if "load_in_fp8" in held:
        use_what_codes_stand_for(whole)
    if "load_in_4bit" in held:
        whole = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, quantization_config=four_bit())
    bare = logits_of(whole).detach()
    expected = logits_of(by_peft(whole.train(), tmp_path, **theirs)).detach()
    assert (expected - bare).abs().max() > 1e-2
    options = {name: value for name, value in ours.items() if name not in held}
    lora = LoRA(4, target_modules=TARGETS, init_from=str(tmp_path), **options)
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=lora, **held)
    tokens = micro_batches()[0][0]
    for cuts in ([0, 4], [0, 1, 4]):
        torch.testing.assert_close(run_stages(build(layers, cuts), tokens, ROW), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MOE[kind]).save_pretrained(tmp_path / "model")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = by_peft(
        reference(tmp_path / "model"), tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names
    )
    lora = LoRA(4, target_modules=["q_proj", "gate_up_proj", "down_proj"], init_from=str(tmp_path / "adapter"))
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=lora)
    found = run_stages(build(layers, [0, 1, 4]), micro_batches()[0][0], ROW)
    torch.testing.assert_close(found, logits_of(adapted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_audio"])
def test_a_model_with_images_or_sound_by_either_form_of_names(tmp_path: Path, kind: str) -> None:
    base = write_base(tmp_path / "base", kind)
    whole = load(base)
    names = [n for n, _ in whole.named_modules() if "language_model" in n and n.rpartition(".")[2] in TARGETS]
    adapted = by_peft(whole, tmp_path / "adapter", target_modules=names)
    tokens = micro_batches()[0][0]
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        assert (load(base)(input_ids=tokens).logits - expected).abs().max() > 1e-2
    for start in (tmp_path / "adapter", as_text_model(tmp_path / "adapter", tmp_path / "former")):
        lora = LoRA(4, target_modules=TARGETS, init_from=str(start))
        layers = CausalLMLayers(base, dtype=torch.float32, adapter=lora)
        stage = layers.build_stage(0, len(layers), CPU).eval()
        torch.testing.assert_close(run_stages([stage], tokens, ROW), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_base_in_fp8_files(tmp_path: Path, in_4bit: bool) -> None:
    write_quantised(tmp_path / "model", "llama", fp8())
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).float()
    if in_4bit:
        plain = AutoModelForCausalLM.from_config(CONFIGS["llama"])  # the loaded model would save FP8 again
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(tmp_path / "plain")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", dtype=torch.float32, quantization_config=four_bit()
        )
    expected = logits_of(by_peft(model.train(), tmp_path / "adapter"))
    lora = LoRA(4, target_modules=TARGETS, init_from=str(tmp_path / "adapter"))
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=lora, load_in_4bit=in_4bit)
    found = run_stages(build(layers, [0, 1, 4]), micro_batches()[0][0], ROW)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "theirs",
    [
        {"exclude_modules": r".*\.(0\.mlp|3\.self_attn)\..*"},  # different targets in some layers
        {"target_modules": ["o_proj", "down_proj"], "exclude_modules": ["model.layers.1.self_attn.o_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [2]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": ["k_proj"], "target_parameters": ["gate_up_proj", "2.mlp.experts.down_proj"]},
    ],
    ids=str,
)
def test_what_the_sentence_says_can_be_followed(tmp_path: Path, theirs: dict[str, Any]) -> None:
    if "target_parameters" in theirs:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MOE["mixtral"]).save_pretrained(tmp_path / "model")
    else:
        write_model(tmp_path / "model", "llama")
    expected = logits_of(by_peft(reference(tmp_path / "model"), tmp_path / "adapter", **theirs))

    def layers_of(**options: Any) -> CausalLMLayers:
        lora = LoRA(4, init_from=str(tmp_path / "adapter"), **options)
        return CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=lora)

    with pytest.raises(ConfigurationError, match="unlike target_modules and layers_to_transform") as refused:
        layers_of(target_modules=["v_proj"])
    said = str(refused.value)
    if pattern := re.search("set target_modules to '(.*)'", said):
        options: dict[str, Any] = {"target_modules": pattern[1]}
    else:
        targets, layers = re.search(r"set these to match it: (.*) of layers \[(.*)\]", said).groups()  # type: ignore[union-attr]
        options = {"target_modules": targets.split(", "), "layers_to_transform": layers}
    found = run_stages(build(layers_of(**options), [0, 1, 4]), micro_batches()[0][0], ROW)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_first_loss_in_two_stages(workers: Workers, tmp_path: Path) -> None:
    make_model(tmp_path / "model", Case("LoRA"), SCALE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted: Any = by_peft(model, tmp_path / "adapter")
    first = items()[:MICRO_BATCHES]
    total, count = 0.0, 0
    for item in first:
        tokens, positions = item["input_ids"][None], item["position_ids"][None]
        logits = adapted(input_ids=tokens, position_ids=positions, use_cache=False).logits.detach()
        total += float(nn.functional.cross_entropy(logits[0], item["labels"], reduction="sum"))
        count += int((item["labels"] != -100).sum())
    lora = LoRA(4, target_modules=TARGETS, init_from=str(tmp_path / "adapter"))
    metrics = workers.run(2, first_step, str(tmp_path / "model"), lora, 2, str(tmp_path / "out"))[0]
    assert metrics["train/loss"] == pytest.approx(total / count, abs=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 8}, "it has rank 4, but rank is 8; set rank to the adapter's"),
        ({"target_modules": ["q_proj"]}, "it adapts model.layers.0.mlp.down_proj"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "does not adapt model.layers.0.self_attn.v_proj"),
        ({"layers_to_transform": "0:1"}, "set these to match it: down_proj, q_proj of layers [0, 1, 2, 3]"),
        ({"use_dora": True}, "use_dora is True, but the adapter has False"),
        ({"init_lora_weights": "pissa"}, "both set the initial A and B"),
        ({"init_from": "/nowhere"}, "init_from /nowhere: there is no such directory"),
    ],
    ids=str,
)
def test_refused(model_dir: Path, adapter: Path, options: dict[str, Any], told: str) -> None:
    chosen = {"rank": 4, "target_modules": TARGETS, "init_from": str(adapter), **options}
    with pytest.raises(ConfigurationError) as refused:
        CausalLMLayers(model_dir, adapter=LoRA(**chosen))
    assert told in str(refused.value)


@pytest.mark.parametrize("kind", ["shape", "nan", "whole"])
def test_another_file(model_dir: Path, adapter: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    if kind == "whole":
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
        tensors["base_model.model.lm_head.weight"] = torch.zeros(128, 64)
    else:
        tensors[name] = torch.full_like(tensors[name], torch.nan) if kind == "nan" else tensors[name][:, :8].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match={"shape": "has shape", "nan": "not finite", "whole": "lm_head"}[kind]):
        CausalLMLayers(model_dir, adapter=LoRA(4, target_modules=TARGETS, init_from=str(tmp_path)))


def test_an_adapter_of_another_base(model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "base_model.json").write_text('{"fingerprint": "0"}')
    lora = LoRA(4, target_modules=TARGETS, init_from=str(tmp_path / "adapter"))
    with pytest.raises(ConfigurationError, match="trained on another base"):
        PipeLiteModule(str(model_dir), lora)
    module = PipeLiteModule(str(model_dir), lora, allow_another_base=True)
    plain = PipeLiteModule(str(model_dir), LoRA(4, target_modules=TARGETS))
    identity = module.checkpoint_identity()
    assert identity == plain.checkpoint_identity()  # so it resumes without the adapter's directory
