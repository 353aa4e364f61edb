from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pipelite.adapters import Full, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
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
    train_whole,
    write_model,
)


@pytest.fixture(scope="module", params=list(CONFIGS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param, max_shard_size="100KB")


@pytest.mark.parametrize("activation_memory", ["keep", "recompute"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_logits_and_every_gradient_are_the_unsplit_models(
    model_dir: Path, cuts: list[int], activation_memory: str
) -> None:
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full(), activation_memory=activation_memory)
    logits, gradients = train_stages(build(layers, cuts))
    expected_logits, expected_gradients = train_whole(reference(model_dir))
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5, msg=name)
        assert gradient.abs().max() > 1e-4, name


def test_packed_documents_are_run_as_if_alone(model_dir: Path) -> None:
    stages = [s.eval() for s in build(CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full()), [0, 1, 4])]
    (input_ids, _), _ = micro_batches()
    packed = run_stages(stages, input_ids, POSITIONS)
    whole = reference(model_dir).eval()
    for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 0, 2), (1, 2, 12)):
        alone = whole(input_ids=input_ids[row : row + 1, start:stop], use_cache=False).logits[0]
        torch.testing.assert_close(packed[row, start:stop], alone, rtol=0, atol=1e-5)
    one_document = whole(input_ids=input_ids[:1], use_cache=False).logits[0]
    assert (packed[0, 5:] - one_document[5:]).abs().max() > 1e-3, "the documents do not matter to this model"


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_each_stage_holds_its_own_weights_bit_equal_and_no_others(model_dir: Path, cuts: list[int]) -> None:
    files = {name: tensor for path in model_dir.glob("*.safetensors") for name, tensor in load_file(path).items()}
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full())
    held: list[str] = []
    for stage in build(layers, cuts):
        names = [name.removeprefix("causal_lm.") for name, _ in stage.named_parameters()]
        for name, parameter in stage.named_parameters():
            expected = files[name.removeprefix("causal_lm.")]
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=0, msg=name)
        owned = tuple(f"model.layers.{number}." for number in range(stage.start, stage.stop))
        expected = {name for name in files if name.startswith(owned)}
        if stage.start == 0 or (stage.stop == 4 and layers.meta_model.tied):
            expected.add("model.embed_tokens.weight")
        if stage.stop == 4:
            expected |= {"model.norm.weight", "lm_head.weight"} & files.keys()
        assert set(names) == expected
        held += names
    assert set(held) == files.keys()


def test_names_do_not_depend_on_the_partition_and_counts_cover_all(model_dir: Path) -> None:
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full())
    whole = {name: p.numel() for name, p in build(layers, [0, 4])[0].named_parameters()}
    stages = build(layers, [0, 1, 2, 3, 4])
    assert {name for stage in stages for name, _ in stage.named_parameters()} == whole.keys()
    assert layers.parameter_counts() == [sum(p.numel() for p in stage.parameters()) for stage in stages]
    assert len(layers) == 4
    assert layers.names == [type(layer).__name__ for layer in reference(model_dir).model.layers]


def test_no_tensor_of_another_stage_is_read(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full())
    read: list[tuple[int, ...]] = []
    materialize = loading._materialize_copy
    monkeypatch.setattr(
        loading, "_materialize_copy", lambda t, *a, **k: read.append(tuple(t.get_shape())) or materialize(t, *a, **k)
    )
    stage = layers.build_stage(1, 2, CPU)
    assert sorted(read) == sorted(tuple(p.shape) for p in stage.parameters())


def test_logits_keep_the_models_dtype_and_modes_reach_the_model(model_dir: Path) -> None:
    stage = CausalLMLayers(model_dir, dtype=torch.bfloat16, adapter=Full()).build_stage(0, 4, CPU)
    (input_ids, _), _ = micro_batches()
    assert stage((input_ids, POSITIONS)).dtype == torch.bfloat16
    assert stage.causal_lm.training
    assert not stage.eval().causal_lm.training


def test_head_and_embedding_with_two_weights_are_told_not_guessed(tmp_path: Path) -> None:
    write_model(tmp_path, "llama_tied")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full())
    torch.testing.assert_close(
        train_stages(build(layers, [0, 2, 4])), train_whole(reference(tmp_path)), rtol=0, atol=1e-5
    )
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for start in (0, 2):
        with pytest.raises(ConfigurationError, match="tie_word_embeddings"):
            layers.build_stage(start, start + 2, CPU)
    layers.build_stage(1, 3, CPU)


def test_weight_under_the_heads_name_only(tmp_path: Path) -> None:
    write_model(tmp_path, "llama_tied")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stages = build(CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full()), [0, 2, 4])
    torch.testing.assert_close(train_stages(stages), train_whole(reference(tmp_path)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [0, 2])
def test_recomputed_dropout_gives_the_same_gradients(tmp_path: Path, start: int) -> None:
    write_model(tmp_path, "llama")
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for activation_memory in ("keep", "recompute"):
        layers = CausalLMLayers(
            tmp_path, dtype=torch.float32, adapter=LoRA(4, dropout=0.5), activation_memory=activation_memory
        )
        stage = layers.build_stage(start, 4, CPU)
        for name, parameter in stage.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        (input_ids, _), _ = micro_batches()
        torch.manual_seed(5)
        logits = stage((input_ids if start == 0 else hidden, POSITIONS))
        logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in stage.named_parameters() if p.requires_grad})
        assert all(g.abs().max() > 0 for g in gradients[-1].values())  # also behind a frozen embedding
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
