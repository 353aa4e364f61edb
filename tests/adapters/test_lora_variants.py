"""rsLoRA, DoRA, PiSSA and LoRA on the experts of MoE models equal PEFT on the unsplit model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from test_lora import trained
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, Stage
from tiny_models import CUTS, SIZES, build, micro_batches, reference, run_stages, train_stages, write_model

ROW = torch.arange(12).expand(2, -1)  # one document a row: some of these models do not isolate documents
VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
MOE = {
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=64),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS),  # its experts are [experts, in, out]
}


def four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def move(stages: list[Stage]) -> None:
    """Change the trained parameters, as training would."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(trained(stages).items()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits_of(model: nn.Module) -> Tensor:
    (input_ids, _), _ = micro_batches()
    return model(input_ids=input_ids, position_ids=ROW, use_cache=False).logits


def check_against_peft(layers: CausalLMLayers, whole: nn.Module, model_dir: Path, directory: Path) -> PeftModel:
    """Randomise and save two stages' adapter, load it on ``whole`` with PEFT, and compare logits and gradients."""
    bare = logits_of(whole).detach()
    stages = build(layers, [0, 1, 4])
    (input_ids, labels), _ = micro_batches()
    if layers.adapter.init_lora_weights != "gaussian":  # all others start as the model itself
        torch.testing.assert_close(run_stages(stages, input_ids, ROW), bare, rtol=0, atol=1e-5)
    move(stages)
    logits, gradients = train_stages(stages, ROW)
    assert gradients.keys() == trained(stages).keys()
    layers.adapter.save(directory, map(layers.trained_state, stages), model_dir)
    loaded = PeftModel.from_pretrained(whole, directory, is_trainable=True)
    saved = load_file(directory / "adapter_model.safetensors")
    theirs = get_peft_model_state_dict(loaded)
    torch.testing.assert_close(saved, theirs, rtol=0, atol=0)
    torch.testing.assert_close(logits[0], logits_of(loaded), rtol=0, atol=1e-5)
    assert (bare - logits[0]).abs().max() > 1e-3
    for input_ids, labels in micro_batches():
        output = loaded(input_ids=input_ids, position_ids=ROW, use_cache=False).logits
        nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
    if "pissa" not in layers.adapter.init_lora_weights:
        expected = {n.removeprefix("base_model.model."): p.grad for n, p in loaded.named_parameters() if "lora_" in n}
        for name, gradient in gradients.items():
            wanted = expected[name.removeprefix("causal_lm.")]
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5, msg=name)
    return loaded


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_are_pefts(tmp_path: Path, variant: str) -> None:
    write_model(tmp_path / "model", "llama")
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=LoRA(4, **VARIANTS[variant]))
    check_against_peft(layers, reference(tmp_path / "model"), tmp_path / "model", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (8 if "pissa" in variant else 4)
    assert config["use_rslora"] == (variant == "rslora")
    assert config["use_dora"] == (variant == "dora")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_on_a_4_bit_base(tmp_path: Path, options: dict) -> None:
    write_model(tmp_path / "model", "llama")
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4, **options))
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, quantization_config=four_bit()
    )
    check_against_peft(layers, whole.train(), tmp_path / "model", tmp_path / "adapter")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_initial_values_do_not_depend_on_the_partition(tmp_path: Path, variant: str) -> None:
    write_model(tmp_path, "llama")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=LoRA(4, **VARIANTS[variant]), seed=3)
    (whole,) = build(layers, [0, 4])
    expected = dict(whole.named_parameters())  # PiSSA changes the frozen weights as well
    for cuts in CUTS:
        torch.manual_seed(cuts[1])
        before = torch.get_rng_state()
        parts = build(layers, cuts)[::-1]
        assert torch.equal(before, torch.get_rng_state())
        for stage in parts:
            for name, parameter in stage.named_parameters():
                torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0, msg=name)


def test_pissa_takes_the_largest_singular_values(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    (stage,) = build(CausalLMLayers(tmp_path, dtype=torch.float32, adapter=LoRA(4, init_lora_weights="pissa")), [0, 4])
    weight = reference(tmp_path).get_submodule("model.layers.2.mlp.up_proj").weight.detach()
    layer = stage.causal_lm.get_submodule("model.layers.2.mlp.up_proj")
    left, values, right = torch.linalg.svd(weight.double())
    largest = left[:, :4] * values[:4] @ right[:4]
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    torch.testing.assert_close(product, largest, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.weight.double(), weight - largest, rtol=0, atol=1e-6)


def write_moe(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MOE[kind], dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("in_4bit", [False, True], ids=["full", "4-bit"])
@pytest.mark.parametrize("kind", list(MOE))
def test_experts_are_pefts(tmp_path: Path, kind: str, in_4bit: bool) -> None:
    model_dir = write_moe(tmp_path / "model", kind)
    layers = CausalLMLayers(model_dir, dtype=torch.float32, load_in_4bit=in_4bit, adapter=LoRA(2), packed=False)
    if in_4bit:
        whole = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, quantization_config=four_bit()
        ).train()
        for parameter in whole.parameters():  # the experts' values after quantisation, in full precision
            if parameter.ndim == 3:
                parameter.data = dequantize_4bit(*quantize_4bit(parameter.data, quant_type="nf4"))
    else:
        whole = reference(model_dir)
    loaded = check_against_peft(layers, whole, model_dir, tmp_path / "adapter")
    experts = [n for n, p in loaded.named_parameters() if "experts" in n and "lora_" in n]
    assert len(experts) == 4 * 2 * 2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    initial = [trained(build(layers, cuts)) for cuts in CUTS]
    for other in initial[1:]:
        torch.testing.assert_close(other, initial[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "linear", "fused"),
    [
        ({"target_modules": ["down_proj"]}, [], ["mlp.experts.down_proj"]),
        ({"target_modules": r".*\.experts\..*_proj", "layers_to_transform": "1"}, [], ["gate_up_proj", "down_proj"]),
        ({"target_modules": ["q_proj", "gate_up_proj"]}, ["q_proj"], ["mlp.experts.gate_up_proj"]),
    ],
    ids=str,
)
def test_experts_are_chosen_by_name(tmp_path: Path, options: dict, linear: list[str], fused: list[str]) -> None:
    layers = CausalLMLayers(write_moe(tmp_path, "mixtral"), dtype=torch.float32, adapter=LoRA(2, **options))
    found, experts = layers.adapter._targets(layers.meta_model)
    count = 1 if "layers_to_transform" in options else 4
    assert len(found) == count * len(linear)
    assert len(experts) == count * len(fused)
    (stage,) = build(layers, [0, 4])
    assert len(trained([stage])) == 2 * (len(found) + len(experts))


@pytest.mark.parametrize(
    ("kind", "options", "in_4bit", "word"),
    [
        ("llama", {"init_lora_weights": "loftq"}, False, "loftq"),
        ("llama", {"init_lora_weights": "pissa", "use_dora": True}, False, "plain LoRA"),
        ("llama", {"init_lora_weights": "pissa"}, True, "load_in_4bit"),
        ("llama", {"init_lora_weights": "pissa", "rank": 65}, False, "singular values"),
        ("mixtral", {"dropout": 0.1}, False, "dropout does not work on fused experts"),
        ("mixtral", {"use_dora": True}, False, "use_dora does not work on fused experts"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, kind: str, options: dict, in_4bit: bool, word: str
) -> None:
    (write_moe if kind in MOE else write_model)(tmp_path, kind)
    with pytest.raises(ConfigurationError, match=word):
        CausalLMLayers(tmp_path, load_in_4bit=in_4bit, adapter=LoRA(**{"rank": 4, **options}))


def test_tensors_that_lack_the_start_of_pissa_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    adapter = LoRA(4, init_lora_weights="pissa")
    plain = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=LoRA(4))
    with pytest.raises(ValueError, match="pissa"):
        adapter.save(tmp_path / "adapter", map(plain.trained_state, build(plain, [0, 4])), tmp_path / "model")
    assert not (tmp_path / "adapter").exists()
