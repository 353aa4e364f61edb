from __future__ import annotations

import os
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers.modeling_utils as modeling_utils
from bitsandbytes.functional import dequantize_4bit, name2qmap, quantize_4bit
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.nf4 import dequantise
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.quantization.four_bit import join
from tiny_models import (
    CPU,
    CUTS,
    POSITIONS,
    SIZES,
    build,
    micro_batches,
    reference,
    run_stages,
    train_stages,
    train_whole,
    write_model,
)


def four_bit_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("causal_lm.").replace(".base_layer", ""): dequantize_4bit(m.weight, m.weight.quant_state)
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_four_bit_stages_equal_the_unsplit_four_bit_model(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path, kind)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=quantization)
    whole.train()
    expected = four_bit_weights(whole)  # before any evaluation, which repacks bitsandbytes' weights on some CPUs
    assert len(expected) == 4 * 7
    (input_ids, _), _ = micro_batches()
    with torch.no_grad():
        expected_logits = whole(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4))
    for cuts in CUTS:
        stages = build(layers, cuts)
        weights = {name: weight for stage in stages for name, weight in four_bit_weights(stage).items()}
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        torch.testing.assert_close(run_stages(stages, input_ids, POSITIONS), expected_logits, rtol=0, atol=1e-5)
        _, gradients = train_stages(stages)
        assert len(gradients) == 4 * 7 * 2
    assert layers.parameter_counts() == CausalLMLayers(tmp_path, adapter=LoRA(4)).parameter_counts()


def test_an_evaluation_leaves_the_gradients_what_they_are(tmp_path: Path) -> None:
    """They equal PEFT's on the dequantised model, even on a CPU where an evaluation would repack the 4-bit weights."""
    write_model(tmp_path, "llama")
    whole = reference(tmp_path)
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = dequantize_4bit(*quantize_4bit(module.weight.data, quant_type="nf4"))
    peft = get_peft_model(whole, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    layers = CausalLMLayers(
        tmp_path, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4, target_modules=["q_proj"])
    )
    (stage,) = build(layers, [0, 4])
    mine = dict(stage.named_parameters())
    theirs = {
        name.replace("base_model.model.", "causal_lm."): p for name, p in peft.named_parameters() if p.requires_grad
    }
    for name, parameter in theirs.items():  # both factors have gradients
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        mine[name].data.copy_(parameter.data)
    with torch.no_grad():
        stage.eval()((micro_batches()[0][0], POSITIONS))
    stage.train()
    _, gradients = train_stages([stage])
    train_whole(whole)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert theirs[name].grad is not None
        torch.testing.assert_close(gradient, theirs[name].grad, rtol=0, atol=1e-5)


EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
MOE = {
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=64),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS),
}


def test_double_quantisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a stage was built on the meta device, as rehearsals and plans do."""
    monkeypatch.delitem(name2qmap, "dynamic", raising=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MOE["mixtral"], dtype=torch.float32).save_pretrained(tmp_path)
    states = []
    for double in (False, True):
        layers = CausalLMLayers(
            tmp_path, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4), bnb_4bit_use_double_quant=double
        )
        layers.build_stage(0, 1, torch.device("meta"))
        model = layers.build_stage(0, 1, CPU).causal_lm
        linear = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        experts = [
            p.quant_state for m in model.modules() for n, ps in getattr(m, "parametrizations", {}).items() for p in ps
        ]
        assert len(linear) == 4
        assert len(experts) == 2
        states.append([state.nested for state in (*linear, *experts)])
    assert states == [[False] * 6, [True] * 6]


@pytest.mark.parametrize("kind", list(MOE))
def test_fused_experts_are_quantised_too(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MOE[kind], dtype=torch.float32).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=quantization)
    experts = {n: p for n, p in whole.named_parameters() if p.ndim == 3}  # transformers does not quantise them
    assert len(experts) == 4 * 2
    for parameter in experts.values():
        parameter.data = dequantize_4bit(*quantize_4bit(parameter.data, quant_type="nf4"))
    (input_ids, _), _ = micro_batches()
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        expected_logits = whole.train()(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4))
    for cuts in CUTS:
        stages = build(layers, cuts)
        for stage in stages:
            for name, parameter in stage.causal_lm.named_parameters():
                assert parameter.ndim < 3, name
            for name, expert in experts.items():
                if stage.start <= int(name.split(".")[2]) < stage.stop:
                    module, _, weight = name.rpartition(".")
                    held = stage.causal_lm.get_submodule(module).get_base_layer()  # inside the LoRA layers
                    torch.testing.assert_close(getattr(held, weight), expert, rtol=0, atol=0, msg=name)
                    parametrization = held.parametrizations[weight]
                    size = parametrization.original.nbytes + parametrization[0].quant_state.absmax.nbytes
                    assert size <= 0.30 * 2 * expert.numel(), name
        torch.testing.assert_close(run_stages(stages, input_ids, positions), expected_logits, rtol=0, atol=1e-5)
        _, gradients = train_stages(stages)
        assert len(gradients) == 2 * sum(hasattr(m, "lora_A") for s in stages for m in s.modules())
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())


def test_linear_layers_that_nobody_quantises_are_told(tmp_path: Path) -> None:
    FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigurationError, match="FalconLinear"):
        CausalLMLayers(tmp_path, load_in_4bit=True, adapter=LoRA(4))


def test_routers_keep_their_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    layers = CausalLMLayers(
        tmp_path, dtype=torch.float32, load_in_4bit=True, adapter=LoRA(4, target_modules=["q_proj"])
    )
    stage = layers.build_stage(0, 2, CPU)
    quantised = {n.rpartition(".")[2] for n, m in stage.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantised == {"base_layer", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {p.dtype for n, p in stage.named_parameters() if "gate." in n} == {torch.float32}


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_fp8", None])
def test_nothing_is_reserved_before_weights_are_quantised(
    quantised: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before loading, transformers would reserve the full size of weights that it does not quantise itself."""
    experts = MixtralConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128}, num_local_experts=4)
    config = LlamaConfig(**SIZES) if quantised == "load_in_fp8" else experts
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    layers = CausalLMLayers(tmp_path, adapter=LoRA(4), **({quantised: True} if quantised else {}))
    asked: list[str | None] = []
    monkeypatch.setattr(
        modeling_utils,
        "caching_allocator_warmup",
        lambda *_: asked.append(os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")),
    )
    layers.build_stage(0, len(layers), CPU)
    assert asked == ([] if quantised else [None])
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_no_adapter_is_merged_into_experts_that_would_not_keep_it(tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(tmp_path)
    (stage,) = build(CausalLMLayers(tmp_path, load_in_4bit=True, adapter=LoRA(4)), [0, 4])
    layer = next(module for module in stage.modules() if isinstance(module, ParamWrapper))
    with pytest.raises(ConfigurationError, match="held in 4 bits, into which an adapter cannot be merged"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("nested", [False, True])
def test_joined_weights_are_as_before_and_as_one(nested: bool) -> None:
    """The second weight's scales, and with them the offset of nested scales, are much larger than the first's."""
    weights = [size * torch.randn(rows, 128) for rows, size in ((256, 0.01), (128, 10.0), (384, 1.0))]
    held = [
        Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested).to("cpu")
        for weight in weights
    ]
    before = [dequantize_4bit(each.data, each.quant_state) for each in held]
    joined = join(held)
    assert joined is not None
    assert torch.equal(dequantise(joined, (768, 128), torch.float32), torch.cat(before))
    for each, whole in zip(held, before, strict=True):
        assert torch.equal(dequantize_4bit(each.data, each.quant_state), whole)
        assert each.data.untyped_storage().data_ptr() == joined[0].untyped_storage().data_ptr()
