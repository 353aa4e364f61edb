"""Models with decoder layers in FP8 equal the same models with the dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedModel, Qwen2MoeConfig

from lightning_pipelite.adapters import ControlAdapter, Full, LoRA, fused_lora
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.fp8_rows import dequantise_rows, quantise_rows
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.quantization import fp8
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from tiny_models import (
    CPU,
    CUTS,
    POSITIONS,
    SIZES,
    build,
    classes_for,
    give_b_values,
    micro_batches,
    reference,
    run_stages,
    train_stages,
    train_whole,
)
from tiny_models import write_model as write

pytestmark = pytest.mark.filterwarnings("ignore:load_in_fp8")


def layers_of(directory: Path, adapter: Any, **options: Any) -> CausalLMLayers:
    return CausalLMLayers(directory, **{"dtype": torch.float32, "load_in_fp8": True, "adapter": adapter, **options})


def dequantised(directory: Path) -> PreTrainedModel:
    """Return the whole model, with its decoder layers' weights quantised to FP8 and dequantised."""
    model = reference(directory)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = dequantise_rows(*quantise_rows(module.weight.data), torch.float32)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])
def test_stages_equal_the_model_that_the_codes_stand_for(tmp_path: Path, kind: str) -> None:
    whole = dequantised(write(tmp_path, kind))
    expected, _ = train_whole(whole)
    gradients: list[dict[str, Tensor]] = []
    for cuts in CUTS:
        stages = build(layers_of(tmp_path, LoRA(4)), cuts)
        held = [m for stage in stages for m in stage.modules() if isinstance(m, Fp8Linear)]
        assert len(held) == 4 * 7
        assert all(
            layer.codes.nbytes == layer.codes.numel() == layer.in_features * layer.out_features for layer in held
        )
        (input_ids, _), _ = micro_batches()
        torch.testing.assert_close(run_stages(stages, input_ids, POSITIONS), expected[0], rtol=0, atol=1e-5)
        give_b_values(stages)
        gradients.append(train_stages(stages)[1])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[-1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            found = stages[int(name.split(".")[2])].causal_lm.get_submodule(name).get_base_layer().weight
            assert torch.equal(found, module.weight), name
            assert found.dtype == module.weight.dtype, name


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_gradients_of_adapters_are_pefts_on_what_the_codes_stand_for(tmp_path: Path, use_dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "up_proj"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=use_dora)
    whole = get_peft_model(dequantised(write(tmp_path, "llama")), config)
    stages = build(layers_of(tmp_path, LoRA(4, target_modules=targets, use_dora=use_dora)), [0, 2, 4])
    give_b_values(stages)
    values = {n: p for stage in stages for n, p in stage.named_parameters() if "lora_" in n}
    for name, parameter in whole.named_parameters():
        if "lora_" in name:
            parameter.data = values[name.replace("base_model.model", "causal_lm")].detach().clone()
    _, expected = train_whole(whole)
    _, found = train_stages(stages)
    assert len(found) == 4 * 3 * (3 if use_dora else 2)
    for name, gradient in found.items():
        wanted = expected[name.replace("causal_lm", "causal_lm.base_model.model")]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "adapter",
    [LoRA(4), LoRA(4, dropout=0.1), LoRA(4, use_dora=True), ControlAdapter(4)],
    ids=["LoRA", "dropout", "DoRA", "control"],
)
@pytest.mark.parametrize("policy", ["selective", "offload"])
def test_ways_to_keep_activations_change_nothing(
    tmp_path: Path, adapter: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FP8 products, as on a GPU that supports them."""
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    write(tmp_path, "llama")

    def run(**options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        stages = build(
            layers_of(tmp_path, adapter, dtype=torch.bfloat16, attn_implementation="eager", **options), [0, 2, 4]
        )
        give_b_values(stages)
        assert all(m.in_fp8 for stage in stages for m in stage.modules() if isinstance(m, Fp8Linear))
        torch.manual_seed(0)
        return train_stages(stages, classes=classes_for(adapter))

    logits, gradients = run(activation_memory="keep")
    others, found = run(activation_memory=policy)
    for one, other in zip(logits, others, strict=True):
        assert torch.equal(one, other)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name


def test_stages_change_nothing_in_products_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    layers = layers_of(write(tmp_path, "llama"), LoRA(4), dtype=torch.bfloat16)
    outcomes = []
    for cuts in ([0, 4], [0, 1, 4]):
        stages = build(layers, cuts)
        give_b_values(stages)
        outcomes.append(train_stages(stages))
    (logits, gradients), (others, found) = outcomes
    assert all(torch.equal(one, other) for one, other in zip(logits, others, strict=True))
    assert gradients.keys() == found.keys()
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    ("adapter", "policy"), [(LoRA(4), "keep"), (ControlAdapter(4), "recompute")], ids=["LoRA", "ControlAdapter"]
)
def test_compiled_layers_are_one_graph(
    tmp_path: Path, adapter: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo.testing as testing

    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    write(tmp_path, "llama")
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: setattr(
        self, "_compiled_call_impl", torch.compile(self._call_impl, backend=counter, fullgraph=True, **kwargs)
    ))  # fmt: skip
    outcomes = []
    for compiled in (True, False):
        options = {"activation_memory": policy, "compile_layers": compiled, "attn_implementation": "eager"}
        options["fp8_transpose_cache"] = policy == "keep"
        stages = build(layers_of(tmp_path, adapter, dtype=torch.bfloat16, **options), [0, 4])
        give_b_values(stages)
        outcomes.append(train_stages(stages, classes=classes_for(adapter)))
    assert counter.frame_count == 2  # two, as the first layer's input requires no gradient
    (logits, gradients), (expected, expected_gradients) = outcomes
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).norm()) <= 0.1 * float(gradient.norm()), name


def test_transposed_weights_biases_and_rows_of_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for block in model.transformer.h:
        for module in (block.attn.c_attn, block.mlp.c_proj):
            module.weight.data[:, 3] = 0
            module.weight.data[:, 4] *= 1e6
            nn.init.normal_(module.bias)
    model.save_pretrained(tmp_path)
    for block in model.transformer.h:
        for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            module.weight.data = dequantise_rows(*quantise_rows(module.weight.data.T), torch.float32).T.contiguous()
            assert module.weight.data.isfinite().all()
    stages = build(layers_of(tmp_path, LoRA(4), packed=False, attn_implementation="eager"), [0, 1, 2])
    (input_ids, _), _ = micro_batches()
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        found = run_stages([stage.eval() for stage in stages], input_ids, positions)
        expected = model(input_ids=input_ids, use_cache=False).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_routers_and_ends_keep_their_precision_and_fused_experts_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    for name, kind in (("qwen", config), ("mixtral", MixtralConfig(**SIZES))):
        AutoModelForCausalLM.from_config(kind, dtype=torch.float32).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigurationError, match=f"load_in_fp8 does not support the fused experts of .*{name}"):
            layers_of(tmp_path / name, LoRA(4))
    stage = layers_of(write(tmp_path / "llama", "llama"), LoRA(4)).build_stage(0, 4, CPU)
    others = {n for n, p in stage.named_parameters() if not p.requires_grad and not n.endswith(("codes", "scales"))}
    assert {name.split(".")[-2] for name in others} == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "adapter", "sentence"),
    [
        ({"load_in_4bit": True}, LoRA(4), "load_in_4bit and load_in_fp8 are mutually exclusive"),
        ({}, Full(), "load_in_fp8 cannot be used with Full"),
        ({}, LoRA(4, init_lora_weights="pissa"), "load_in_fp8 cannot be used with init_lora_weights pissa"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, options: Any, adapter: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        layers_of(write(tmp_path, "llama"), adapter, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    file = write(tmp_path, "llama") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    layers = layers_of(tmp_path, LoRA(4))
    layers.build_stage(0, 2, CPU)
    with pytest.raises(ConfigurationError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds values that are nan"):
        layers.build_stage(2, 4, CPU)


@pytest.mark.parametrize(
    ("dtype", "able", "sentence"),
    [
        (
            torch.bfloat16,
            False,
            "weights are dequantised before each product.*cpu does not support FP8 matrix products",
        ),
        (torch.float32, True, "weights are dequantised.*model.dtype is not bfloat16"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_one_sentence_says_that_products_are_not_in_fp8(
    tmp_path: Path, monkeypatch: Any, dtype: Any, able: bool, sentence: str
) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: able)
    layers = layers_of(write(tmp_path, "llama"), LoRA(4), dtype=dtype)
    with pytest.warns(UserWarning, match=sentence) as said:
        layers.build_stage(0, 4, CPU)
    assert sum("load_in_fp8" in str(each.message) for each in said) == 1


def test_loading_holds_no_more_than_one_weight_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread reads weights ahead, so each can be quantised before the next is read."""
    write(tmp_path, "llama")
    from transformers import core_model_loading

    layers = layers_of(tmp_path, LoRA(4))
    read_ahead = lambda *_: pytest.fail("a thread reads ahead")  # noqa: E731
    monkeypatch.setattr(core_model_loading.ThreadPoolExecutor, "submit", read_ahead)
    layers.build_stage(0, 4, CPU)


def test_scales_stay_in_float32_and_a_weight_can_be_set_again(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    (stage,) = build(layers_of(tmp_path, LoRA(4)), [0, 4])
    layer = next(module for module in stage.modules() if isinstance(module, Fp8Linear))
    before = layer.weight.clone()
    stage.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float32
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)
    layer.weight = nn.Parameter(2 * before)
    torch.testing.assert_close(layer.weight, 2 * before, rtol=0, atol=0)


def test_layers_of_one_input_are_held_and_computed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer can still be read, moved, called and given a new weight separately."""
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    whole = reference(write(tmp_path, "llama"))
    (stage,) = build(layers_of(tmp_path, LoRA(4), dtype=torch.bfloat16), [0, 4])
    give_b_values([stage])
    called: list[list[int]] = []
    ours = fused_lora.lora_linear

    def count(x: Tensor, weights: Any, a: Any, b: Any, *rest: Any, **options: Any) -> list[Tensor]:
        called.append([len(weights), len(b)])
        return ours(x, weights, a, b, *rest, **options)

    monkeypatch.setattr(fused_lora, "lora_linear", count)
    train_stages([stage])
    assert called[:4] == [[1, 3], [1, 1], [1, 2], [1, 1]]  # q, k and v; o; gate and up; down

    layers = {n: m for n, m in stage.causal_lm.named_modules() if isinstance(m, Fp8Linear)}
    held = [p for m in layers.values() for p in m.parameters() if p.dtype == torch.uint8]
    assert len(held) == 4 * 4
    assert sum(p.numel() for p in held) == sum(m.in_features * m.out_features for m in layers.values())
    stage.to(torch.float16).to(torch.bfloat16)
    for name, layer in layers.items():
        weight = whole.get_submodule(name.removesuffix(".base_layer")).weight.detach().to(torch.bfloat16)
        assert layer.scales.shape == (layer.out_features,)
        assert torch.equal(layer.weight, dequantise_rows(*quantise_rows(weight), torch.bfloat16)), name
        x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight), rtol=0.1, atol=0.1)

    query, key, value = (
        next(m for n, m in layers.items() if f"layers.1.self_attn.{name}" in n)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    before = [each.weight.clone() for each in (query, key, value)]
    key.weight = nn.Parameter(2 * before[1])
    for found, expected in zip((query, key, value), (before[0], 2 * before[1], before[2]), strict=True):
        assert torch.equal(found.weight, expected)


def test_with_scales_that_differ_they_are_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    linear = [nn.Linear(32, out, bias=False, device="meta") for out in (16, 48)]
    model = nn.Sequential(*(Fp8Linear(each, "layer", torch.bfloat16, CPU) for each in linear))
    for layer in model:
        layer.weight = nn.Parameter(torch.randn(layer.out_features, 32))
    config = LoraConfig(r=2, target_modules=["0", "1"], alpha_pattern={"1": 8}, init_lora_weights=False)
    inject_adapter_in_model(config, model)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    wanted = [layer(x) for layer in model]
    fused_lora.fuse({"0": model[0], "1": model[1]}, "default", [["0", "1"]])
    for found, exact in zip([layer(x) for layer in model], wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_peft_merges_no_adapter_into_a_weight_that_would_not_keep_it(options: Any, safe_merge: bool) -> None:
    layer = Fp8Linear(nn.Linear(32, 16, device="meta", bias=False), "layer", torch.float32, CPU)
    layer.weight = nn.Parameter(torch.randn(16, 32))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(layer), config)
    x = torch.randn(3, 32)
    before = model(x)
    with pytest.raises(ConfigurationError, match="held by load_in_fp8 cannot be changed, so no adapter"):
        model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(x), before)
