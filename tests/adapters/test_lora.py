from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny_families
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, MetaModel, Stage
from tiny_models import (
    CONFIGS,
    CPU,
    CUTS,
    POSITIONS,
    build,
    micro_batches,
    reference,
    run_stages,
    train_stages,
    write_model,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lora"), "llama")


def trained(stages: list[Stage]) -> dict[str, torch.Tensor]:
    return {name: p for stage in stages for name, p in stage.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_values_are_bit_equal_whatever_the_partition(model_dir: Path, dtype: str) -> None:
    layers = CausalLMLayers(model_dir, adapter=LoRA(4, dtype=dtype), seed=7)
    torch.manual_seed(0)
    whole = trained(build(layers, [0, 4]))
    assert len(whole) == 4 * 7 * 2
    assert {p.dtype for p in whole.values()} == {getattr(torch, dtype)}
    for cuts in CUTS:
        torch.manual_seed(cuts[1])
        before = torch.get_rng_state()
        parts = trained(build(layers, cuts)[::-1])
        assert torch.equal(before, torch.get_rng_state())
        assert parts.keys() == whole.keys()
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    for name, parameter in whole.items():
        assert parameter.any() == ("lora_A" in name)
        # U(-1/sqrt(in), 1/sqrt(in)) has the variance 1 / (3 in).
        if "lora_A" in name and dtype == "float32":
            assert parameter.abs().max() <= parameter.shape[1] ** -0.5
            assert 0.7 < parameter.var() * 3 * parameter.shape[1] < 1.3
    downs = [p for name, p in whole.items() if "q_proj.lora_A" in name]
    assert not torch.equal(downs[0], downs[1])
    other = trained(build(CausalLMLayers(model_dir, adapter=LoRA(4, dtype=dtype), seed=8), [0, 4]))
    assert not any(torch.equal(other[name], whole[name]) for name in whole if "lora_A" in name)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options", [{}, {"layers_to_transform": "1:2"}, {"target_modules": ["q_proj", "down_proj"]}], ids=str
)
def test_peft_loads_the_saved_adapter_and_gives_the_stages_logits(tmp_path: Path, kind: str, options: dict) -> None:
    write_model(tmp_path / "model", kind)
    adapter = LoRA(4, **options)
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=adapter)
    stages = build(layers, [0, 1, 4])
    generator = torch.Generator().manual_seed(0)
    for parameter in trained(stages).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save(tmp_path / "adapter", (layers.trained_state(stage) for stage in stages), tmp_path / "model")
    loaded = PeftModel.from_pretrained(reference(tmp_path / "model"), tmp_path / "adapter", is_trainable=True)
    lora = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert len(lora) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(trained(stages))
    (input_ids, _), _ = micro_batches()
    expected = loaded(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(run_stages(stages, input_ids, POSITIONS), expected, rtol=0, atol=1e-5)
    bare = reference(tmp_path / "model")(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    assert (bare - expected).abs().max() > 1e-3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 4, "CAUSAL_LM")
    assert Path(config["base_model_name_or_path"]) == tmp_path / "model"
    if "target_modules" in options:
        assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_gradients_are_pefts_on_the_unsplit_model(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "model", kind)
    adapter = LoRA(4)
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=adapter)
    stages = build(layers, [0, 1, 2, 4])
    for name, parameter in trained(stages).items():
        parameter.data.fill_(0.01) if "lora_B" in name else None
    adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), tmp_path / "model")
    whole = PeftModel.from_pretrained(reference(tmp_path / "model"), tmp_path / "adapter", is_trainable=True)
    _, gradients = train_stages(stages)
    for input_ids, labels in micro_batches():
        logits = whole(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in whole.named_parameters() if p.requires_grad}
    assert {name.removeprefix("causal_lm.") for name in gradients} == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("causal_lm.")], rtol=0, atol=1e-5, msg=name)


def test_a_stage_may_have_nothing_to_train(model_dir: Path) -> None:
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=LoRA(4, layers_to_transform=[3]))
    stages = build(layers, [0, 2, 4])
    assert not trained(stages[:1])
    assert layers.trained_state(stages[0]) == {}
    assert all(".layers.3." in name for name in trained(stages))
    _, gradients = train_stages(stages)
    assert gradients.keys() == trained(stages).keys()


def test_an_adapter_directory_is_replaced_and_nothing_else(model_dir: Path, tmp_path: Path) -> None:
    adapter = LoRA(4)
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=adapter)
    state = layers.trained_state(layers.build_stage(0, 4, CPU))
    for factor in (1, 2):
        adapter.save(tmp_path / "a", [{name: factor * w for name, w in state.items()}], model_dir)
        saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
        torch.testing.assert_close(saved, {name: factor * w for name, w in state.items()}, rtol=0, atol=0)
    with pytest.raises(ConfigurationError, match=r"holds config\.json"):
        adapter.save(model_dir, [state], model_dir)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 4, "dropout": 1.0}, "dropout"),
        ({"rank": 4, "dtype": "float8"}, "dtype"),
        ({"rank": 4, "target_modules": ["lm_head"]}, "lm_head"),
        ({"rank": 4, "target_modules": ["mlp"]}, "mlp"),
        ({"rank": 4, "target_modules": "q_proj"}, "q_proj"),  # a regular expression has to match the whole name
        ({"rank": 4, "target_modules": r".*layers\.3.*q_proj", "layers_to_transform": "0:1"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_wrong_options_are_named(model_dir: Path, options: dict, word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        CausalLMLayers(model_dir, adapter=LoRA(**options))


def test_what_peft_would_load_under_another_name_is_refused(tmp_path: Path) -> None:
    tiny_families.tiny("laguna").save_pretrained(tmp_path)
    meta_model = MetaModel(tmp_path)
    with pytest.raises(ConfigurationError, match=r"mlp\.shared_experts\.down_proj, whose adapter PEFT loads under an"):
        LoRA(4).check(meta_model, load_in_4bit=False)
    LoRA(4, target_modules=["q_proj", "experts.gate_up_proj"]).check(meta_model, load_in_4bit=False)
