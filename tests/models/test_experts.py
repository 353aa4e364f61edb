"""Layers with experts equal PEFT, which materialises every product of A and B; compiled, they share one graph."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GptOssConfig, MixtralConfig, Qwen2MoeConfig

from lightning_pipelite.adapters import ControlAdapter, Full, LoRA
from lightning_pipelite.adapters.experts import _GroupedLoRA as GroupedLoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.experts import _GroupedExperts
from tiny_models import (
    CPU,
    SIZES,
    build,
    classes_for,
    cross_entropy,
    give_b_values,
    micro_batches,
    train_stages,
)

ROUTED = {"num_experts_per_tok": 2, "num_local_experts": 4}
MODELS: dict[str, Any] = {
    "mixtral": MixtralConfig(**SIZES, **ROUTED),
    "gpt_oss": GptOssConfig(**SIZES, **ROUTED),  # transposed weights, biases, clamping
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    "glm4_moe": Glm4MoeConfig(
        **SIZES, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=64,
        first_k_dense_replace=1,
    ),
}  # fmt: skip
POSITIONS = torch.arange(12).repeat(2, 1)  # one document a row: some of the plain models do not keep several apart
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def write(directory: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(MODELS[kind], dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return directory


def train(directory: Path, adapter: Any, **options: Any) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    options = {"activation_memory": "recompute", **options}
    layers = CausalLMLayers(directory, dtype=torch.float32, adapter=adapter, **options)
    (stage,) = stages = build(layers, [0, 4])
    give_b_values(stages)
    logits, gradients = train_stages(stages, POSITIONS, classes_for(adapter))
    return logits, gradients, (layers, stage)


@pytest.mark.parametrize("kind", MODELS)
def test_equals_peft(tmp_path: Path, kind: str) -> None:
    adapter = LoRA(4, target_modules=EXPERTS, use_rslora=True)
    logits, gradients, (layers, stage) = train(write(tmp_path, kind), adapter, attn_implementation="eager")
    assert sum(isinstance(module, GroupedLoRA) for module in stage.modules()) == (3 if kind == "glm4_moe" else 4)
    adapter.save(tmp_path / "adapter", [layers.trained_state(stage)], tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    for (input_ids, labels), ours in zip(micro_batches(), logits, strict=True):
        output = theirs(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
        torch.testing.assert_close(ours, output, rtol=0, atol=2e-5)
        cross_entropy(output, labels).backward()
    found = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == {name.removeprefix("causal_lm.") for name in gradients}
    for name, gradient in gradients.items():
        wanted = found[name.removeprefix("causal_lm.")]
        assert float((gradient - wanted).norm()) <= 1e-4 * float(wanted.norm()), name


@pytest.mark.parametrize("off", ["gate_up_proj", "down_proj"])
def test_with_one_of_two_adapters_switched_off_equals_peft(tmp_path: Path, off: str) -> None:
    adapter = LoRA(4, target_modules=EXPERTS)
    _, _, (layers, stage) = train(write(tmp_path, "mixtral"), adapter)
    adapter.save(tmp_path / "adapter", [layers.trained_state(stage)], tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for model in (stage, theirs):
        for module in model.modules():
            if isinstance(module, ParamWrapper) and module.parameter_name == off:
                module.enable_adapters(False)
    (input_ids, _), *_ = micro_batches()
    with torch.no_grad():
        ours = stage((input_ids, POSITIONS))
        output = theirs(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(ours, output, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "policy", "in_4bit", "adapter"),
    [
        ("mixtral", "recompute", False, LoRA(4)),
        ("gpt_oss", "recompute", True, LoRA(4)),
        ("mixtral", "keep", True, LoRA(4, target_modules=["q_proj"])),
        ("gpt_oss", "keep", False, ControlAdapter(4)),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, bool)) else type(value).__name__,
)
def test_compiled_as_one_graph_for_all_layers(
    tmp_path: Path, kind: str, policy: str, in_4bit: bool, adapter: Any
) -> None:
    import torch._dynamo.testing as testing

    write(tmp_path, kind)
    options = {"load_in_4bit": in_4bit, "activation_memory": policy, "attn_implementation": "eager"}
    expected, expected_gradients, _ = train(tmp_path, adapter, **options, compile_layers=False)
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **kwargs: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl, backend=counter, **kwargs)
        ))  # fmt: skip
        logits, gradients, _ = train(tmp_path, adapter, **options, compile_layers=True)
    # One for the first layer, whose input requires no gradient, one for the others; different routing adds none.
    assert counter.frame_count == 2
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


@pytest.mark.parametrize("adapter", [LoRA(4), LoRA(4, target_modules=["q_proj"])], ids=["experts", "attention"])
def test_a_model_that_is_dropped_leaves_no_weights(tmp_path: Path, adapter: LoRA) -> None:
    write(tmp_path, "mixtral")
    _, _, (layers, stage) = train(tmp_path, adapter, load_in_4bit=True)
    weights = [weakref.ref(parameter) for parameter in stage.parameters()]
    assert any(weight().dtype == torch.uint8 for weight in weights)
    del layers, stage
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_trained_experts_are_left_to_transformers(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(target_modules=["mlp"]))
    assert not any(isinstance(module, _GroupedExperts) for module in layers.build_stage(0, 4, CPU).modules())
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(target_modules=["self_attn"]))
    assert sum(isinstance(module, _GroupedExperts) for module in layers.build_stage(0, 4, CPU).modules()) == 4
