"""LoRA on GPT-2's linear layers, which are transformers' Conv1D, equals PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from lightning.pytorch import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.callbacks.support.low_rank import chunks, find_low_rank, gram_matrices
from lightning_pipelite.export import analyze, export_gguf, merge
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.flops import training_flops
from tiny_models import POSITIONS, build, cross_entropy, micro_batches, run_stages, train_stages

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "some": {"target_modules": ["c_attn", "mlp.c_proj"]},
}
(INPUT_IDS, LABELS), _ = micro_batches()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).train()


def logits(model: Any) -> Tensor:
    return model(input_ids=INPUT_IDS, position_ids=POSITIONS, use_cache=False).logits


def randomise(stages: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for stage in stages for p in stage.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_gradients_and_merge_are_pefts(base: Path, tmp_path: Path, variant: str) -> None:
    adapter = LoRA(4, **VARIANTS[variant])
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=adapter)
    stages = build(layers, [0, 1, 4])
    torch.testing.assert_close(run_stages(stages, INPUT_IDS, POSITIONS), logits(load(base)), rtol=0, atol=1e-4)
    randomise(stages)
    adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), layers.meta_model)
    whole = PeftModel.from_pretrained(load(base), tmp_path / "adapter", is_trainable=True)
    kept = len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert kept == sum("lora_" in name for name, _ in whole.named_parameters())
    torch.testing.assert_close(run_stages(stages, INPUT_IDS, POSITIONS), logits(whole), rtol=0, atol=1e-4)
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(whole), rtol=0, atol=1e-4)
    if variant == "pissa":  # saved with twice the rank, so its parameters differ
        return
    _, gradients = train_stages(stages)
    for input_ids, labels in micro_batches():
        output = whole(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
        cross_entropy(output, labels).backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in whole.named_parameters() if p.requires_grad}
    assert {name.removeprefix("causal_lm.") for name in gradients} == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("causal_lm.")], rtol=0, atol=1e-5, msg=name)


def test_all_linear_and_the_saved_configuration_are_pefts(base: Path, tmp_path: Path) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=LoRA(4))
    (stage,) = build(layers, [0, 4])
    layers.adapter.save(tmp_path / "ours", [layers.trained_state(stage)], layers.meta_model)
    theirs = get_peft_model(load(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert ours["fan_in_fan_out"] is theirs["fan_in_fan_out"] is True
    assert set(ours["target_modules"]) == {name.rpartition(".")[2] for name in theirs["target_modules"]}
    shapes = [
        {key: tensor.shape for key, tensor in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]


def test_gguf_and_analysis(base: Path, tmp_path: Path) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=LoRA(4))
    stages = build(layers, [0, 4])
    randomise(stages)
    layers.adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), layers.meta_model)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    export_gguf(str(tmp_path / "adapter"), str(base), str(tmp_path / "adapter.gguf"))
    written = {each.name: torch.tensor(each.data) for each in GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert len(written) == len(saved) == 2 * 4 * 4
    for ours, theirs in (("attn.c_attn", "attn_qkv"), ("mlp.c_proj", "ffn_down")):
        for letter in "AB":
            tensor = saved[f"base_model.model.transformer.h.3.{ours}.lora_{letter}.weight"]
            found = written[f"blk.3.{theirs}.weight.lora_{letter.lower()}"]
            torch.testing.assert_close(found, tensor, rtol=0, atol=0)
    analyze(str(tmp_path / "adapter"), str(base), str(tmp_path / "analysis"))
    figures = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["figures"]
    a, b = (saved[f"base_model.model.transformer.h.3.mlp.c_fc.lora_{letter}.weight"] for letter in "AB")
    weight = load(base).get_parameter("transformer.h.3.mlp.c_fc.weight").detach()
    product = figures["transformer.h.3.mlp.c_fc.weight"]
    assert product["relative"] == pytest.approx(float((b @ a).norm() / weight.norm()), rel=1e-4)


def test_norms_and_flops_count_them(base: Path) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=LoRA(4))
    (stage,) = build(layers, [0, 4])
    randomise([stage])
    module = LightningModule()
    module.stage = stage
    pairs = find_low_rank(module)
    assert len(pairs) == 4 * 4
    for chunk in chunks(pairs):
        for pair, norm in zip(chunk.pairs, chunk.norms(*gram_matrices(*chunk.stack())), strict=True):
            torch.testing.assert_close(norm.float(), (pair.scale * pair.b @ pair.a).norm(), rtol=1e-4, atol=0)
    trained = {n.removeprefix("causal_lm."): p for n, p in stage.named_parameters() if p.requires_grad}
    flops = training_flops(layers.meta_model, trained)
    frozen = sum(p.numel() for n, p in layers.meta_model.model.named_parameters() if p.ndim == 2 and ".h." in n)
    assert flops is not None
    assert flops.per_token == 4 * (frozen + 128 * 64) + 6 * sum(p.numel() for p in trained.values())


def test_in_4_bits_they_are_transformers_own(base: Path) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4))
    (stage,) = build(layers, [0, 4])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    expected = logits(load(base, quantization_config=config))
    torch.testing.assert_close(run_stages([stage], INPUT_IDS, POSITIONS), expected, rtol=0, atol=1e-4)
    assert (expected - logits(load(base))).abs().max() > 0.1
    planned = layers.build_stage(0, 4, torch.device("meta"))
    held = [{n: (p.shape, p.dtype) for n, p in each.named_parameters()} for each in (stage, planned)]
    assert held[0] == held[1]
    randomise([stage])
    run_stages([stage], INPUT_IDS, POSITIONS).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in stage.parameters() if p.requires_grad)


def test_the_whole_model(base: Path, tmp_path: Path) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=Full())
    stages = build(layers, [0, 2, 4])
    layers.adapter.save(tmp_path / "saved", map(layers.trained_state, stages), layers.meta_model)
    torch.testing.assert_close(logits(load(tmp_path / "saved")), logits(load(base)))
    again = CausalLMLayers(tmp_path / "saved", dtype=torch.float32, adapter=Full())
    torch.testing.assert_close(run_stages(build(again, [0, 4]), INPUT_IDS, POSITIONS), logits(load(base)))
