from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lightning_pipelite.adapters import Full
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from tiny_models import CONFIGS, CPU, POSITIONS, build, micro_batches, reference, run_stages, write_model


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("cuts", [[0, 4], [0, 1, 4]], ids=str)
def test_saved_model_loads_and_gives_the_stages_logits(tmp_path: Path, kind: str, cuts: list[int]) -> None:
    source, target = write_model(tmp_path / "model", kind), tmp_path / "trained"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(source)
    GenerationConfig(temperature=0.5, do_sample=True).save_pretrained(source)
    adapter = Full()
    layers = CausalLMLayers(source, dtype=torch.float32, adapter=adapter)
    stages = build(layers, cuts)
    with torch.no_grad():
        for name in {name for stage in stages for name, _ in stage.named_parameters()}:
            for stage in stages:  # a tied weight changes alike on both stages, as in training
                if name in (parameters := dict(stage.named_parameters())):
                    parameters[name].mul_(1.5)
    adapter.save(target, map(layers.trained_state, stages), source)
    before, after = tensors(source), tensors(target)
    torch.testing.assert_close(after, {name: 1.5 * tensor for name, tensor in before.items()}, rtol=0, atol=0)
    assert len(list(target.glob("*.safetensors"))) == len(cuts) - 1
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    model, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.config.use_cache
    assert model.generation_config.temperature == 0.5
    (input_ids, _), _ = micro_batches()
    expected = model(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(run_stages(stages, input_ids, POSITIONS), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(target).chat_template == "{{ messages }}"
    CausalLMLayers(target, adapter=adapter).build_stage(0, 4, CPU)  # what is saved can be trained again


def test_dtype_of_the_saved_model(tmp_path: Path) -> None:
    source, target = write_model(tmp_path / "model", "qwen3"), tmp_path / "trained"
    adapter = Full()
    layers = CausalLMLayers(source, dtype=torch.bfloat16, adapter=adapter)
    for _ in range(2):  # the second replaces the first
        adapter.save(target, [layers.trained_state(stage) for stage in build(layers, [0, 4])], source)
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)}),
        (
            {"target_modules": ["mlp"], "layers_to_transform": "1"},
            {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
        ),
        ({"target_modules": ["lm_head"]}, {"model.embed_tokens.weight"}),  # tied: one weight, on both stages
        ({"target_modules": r"model\.norm"}, {"model.norm.weight"}),
    ],
    ids=["a name", "a name in one layer", "the tied head", "a pattern"],
)
def test_only_the_chosen_weights_are_trained(tmp_path: Path, options: dict, expected: set[str]) -> None:
    write_model(tmp_path, "llama_tied")
    stages = build(CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(**options)), [0, 2, 4])
    trained = [{n.removeprefix("causal_lm.") for n, p in s.named_parameters() if p.requires_grad} for s in stages]
    assert trained[0] | trained[1] == expected
    if "lm_head" in options["target_modules"]:
        assert trained[0] == trained[1] == expected


def test_layers_alone_freeze_embedding_norm_and_head(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    (stage,) = build(CausalLMLayers(tmp_path, adapter=Full(layers_to_transform="0, 3")), [0, 4])
    names = [name for name, p in stage.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 9
    assert all(".layers.0." in name or ".layers.3." in name for name in names)


def test_the_trained_model_itself_is_not_overwritten(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    with pytest.raises(ConfigurationError, match="is the model being trained"):
        Full().save(tmp_path, [{}], tmp_path)


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    for options, word in (
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"target_modules": ["lm_head"], "layers_to_transform": "0"}, "layers"),
    ):
        with pytest.raises(ConfigurationError, match=word):
            CausalLMLayers(tmp_path, adapter=Full(**options))


def test_reference_is_not_the_stage(tmp_path: Path) -> None:
    """The reference used above reads the files itself and shares no memory with a stage."""
    write_model(tmp_path, "llama")
    (stage,) = build(CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full()), [0, 4])
    with torch.no_grad():
        next(stage.parameters()).add_(1)
    assert torch.equal(next(reference(tmp_path).parameters()), tensors(tmp_path)["model.embed_tokens.weight"])
