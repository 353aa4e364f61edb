"""Rows of embedding and head that are trained with a LoRA equal PEFT's on the unsplit model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora_variants import ROW, four_bit
from test_whole_names import load, write_base
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PhiConfig

from adapter_jobs import LR, SCALE, resume
from exact_comparison import compare
from exact_training import LOSS_LIMIT, WEIGHT_LIMIT, Case, Split, make_model
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import analyze, export_gguf, merge
from lightning_pipelite.models import CausalLMLayers, Stage
from lightning_pipelite.models.head import HeadInputs
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.module.greedy import _next_token
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.simulation import Simulation
from processes import Workers
from tiny_models import CPU, SIZES, build, micro_batches, reference, run_stages, write_model

TOKENS = [5, 3, 100]
KEY = "trainable_token_indices"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {kind: write_model(directory / kind, kind) for kind in ("llama", "llama_tied", "gemma3")}


def move(stages: list[Stage]) -> None:
    """Change the trained parameters, copies of the same one alike."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    for name, parameter in (each for stage in stages for each in stage.named_parameters() if each[1].requires_grad):
        if name not in values:
            values[name] = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values[name])


def input_ids() -> Tensor:
    ids = micro_batches()[0][0].clone()
    ids[0, 2:5], ids[1, 7] = torch.tensor(TOKENS), TOKENS[0]
    return ids


def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=input_ids(), position_ids=ROW, use_cache=False).logits.detach()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_equals_a_plain_loop_over_pefts_model(workers: Workers, tied: bool) -> None:
    case = Case("rows", tied=tied, targets=("q_proj", "down_proj"), tokens=tuple(range(511, -1, -2)))
    splits = [Split(1), Split(2), *([Split(2, virtual_stages=2)] if tied else [])]
    for split, loss, weight in compare(workers, case, splits, 6, SCALE):
        assert loss < LOSS_LIMIT, split
        assert weight < WEIGHT_LIMIT, split


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("llama", TOKENS),
        ("llama", {"lm_head": TOKENS}),
        ("llama_tied", TOKENS),
        ("llama_tied", {"model.embed_tokens": TOKENS}),
        ("gemma3", TOKENS),  # scales its embeddings and soft-caps its logits
    ],
    ids=str,
)
def test_saved_for_peft_and_merged(models: dict[str, Path], tmp_path: Path, kind: str, rows: Any) -> None:
    lora = LoRA(2, target_modules=["q_proj"], trainable_token_indices=rows)
    layers = CausalLMLayers(models[kind], dtype=torch.float32, adapter=lora)
    stages = build(layers, [0, 2, 4])
    bare = logits_of(reference(models[kind]))
    torch.testing.assert_close(run_stages(stages, input_ids(), ROW), bare, rtol=0, atol=1e-5)
    move(stages)
    expected = run_stages(stages, input_ids(), ROW).detach()
    assert (bare - expected).abs().max() > 0.1
    lora.save(tmp_path / "adapter", map(layers.trained_state, stages), layers.meta_model)
    loaded = PeftModel.from_pretrained(reference(models[kind]), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)
    merge(str(models[kind]), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    torch.testing.assert_close(logits_of(reference(tmp_path / "merged")), expected, rtol=0, atol=1e-5)


def test_all_that_is_made_of_an_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    def saved(name: str, **options: Any) -> str:
        lora = LoRA(2, target_modules=["q_proj"], **options)
        layers = CausalLMLayers(models["llama"], dtype=torch.float32, adapter=lora)
        lora.save(tmp_path / name, [layers.trained_state(layers.build_stage(0, 4, CPU))], layers.meta_model)
        return str(tmp_path / name)

    base, adapter = str(models["llama"]), saved("adapter", trainable_token_indices=TOKENS)
    assert "3 rows of lm_head" in analyze(adapter, output=str(tmp_path / "analysis"))
    with pytest.raises(ConfigurationError, match="merge it into its base"):
        export_gguf(adapter, base, str(tmp_path / "adapter.gguf"))
    with pytest.raises(ConfigurationError, match="rows of tokens, which cannot be scaled"):
        merge(base, adapter, str(tmp_path / "merged"), scale=0.5)
    merge(base, [adapter, saved("plain")], str(tmp_path / "both"))
    with pytest.raises(ConfigurationError, match=r"replaces values of lm_head\.weight, which .* changes too"):
        merge(base, [adapter, saved("other", trainable_token_indices=[1])], str(tmp_path / "merged"))
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    name = next(name for name in tensors if "lm_head" in name)
    for changed in ({**tensors, name: tensors[name][:2]}, {n: t for n, t in tensors.items() if n != name}):
        save_file({n: t.clone() for n, t in changed.items()}, f"{adapter}/adapter_model.safetensors")
        with pytest.raises(ConfigurationError, match="lm_head"):
            merge(base, adapter, str(tmp_path / "merged"))


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_of_a_model_with_images(tmp_path: Path, kind: str) -> None:
    base = write_base(tmp_path / "base", kind)
    lora = LoRA(2, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=lora)
    stages = [layers.build_stage(0, len(layers), CPU).eval()]
    move(stages)
    lora.save(tmp_path / "adapter", map(layers.trained_state, stages), layers.meta_model)
    expected = run_stages(stages, input_ids(), ROW).detach()
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids=input_ids()).logits, expected, rtol=0, atol=1e-5)
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
        merged = load(tmp_path / "merged")(input_ids=input_ids()).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (load(base)(input_ids=input_ids()).logits - expected).abs().max() > 0.1
    again = LoRA(2, target_modules=["q_proj"], trainable_token_indices=TOKENS, init_from=str(tmp_path / "adapter"))
    begun = CausalLMLayers(base, dtype=torch.float32, adapter=again).build_stage(0, len(layers), CPU).eval()
    torch.testing.assert_close(run_stages([begun], input_ids(), ROW), expected, rtol=0, atol=1e-5)


def by_peft(model: Any, directory: Path, rows: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], trainable_token_indices=rows)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name or "trainable_tokens_delta" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(directory))
    return adapted


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("llama", {"embed_tokens": TOKENS, "lm_head": [1, 2]}, {"lm_head": [2, 1], "embed_tokens": sorted(TOKENS)}),
        ("llama", TOKENS, {"embed_tokens": TOKENS}),  # in an untied model, PEFT applies a list to the embedding only
        ("llama_tied", TOKENS, sorted(TOKENS)),
        ("llama", None, TOKENS),  # a LoRA alone: the rows start as the model's
    ],
    ids=str,
)
def test_starts_as_peft_has_it(models: dict[str, Path], tmp_path: Path, kind: str, theirs: Any, ours: Any) -> None:
    in_4bit = kind == "llama" and isinstance(theirs, dict)
    whole: Any = reference(models[kind])
    if in_4bit:
        whole = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32, quantization_config=four_bit())
    expected = logits_of(by_peft(whole.train(), tmp_path, theirs))
    lora = LoRA(4, target_modules=["q_proj"], init_from=str(tmp_path), trainable_token_indices=ours)
    layers = CausalLMLayers(models[kind], dtype=torch.float32, adapter=lora, load_in_4bit=in_4bit)
    torch.testing.assert_close(run_stages(build(layers, [0, 1, 4]), input_ids(), ROW), expected, rtol=0, atol=1e-5)


def test_other_tokens_than_those_of_the_start(models: dict[str, Path], tmp_path: Path) -> None:
    by_peft(reference(models["llama"]), tmp_path, TOKENS)
    for ours in (None, TOKENS, {"embed_tokens": [5, 3]}):
        lora = LoRA(4, target_modules=["q_proj"], init_from=str(tmp_path), trainable_token_indices=ours)
        with pytest.raises(
            ConfigurationError, match=r"set trainable_token_indices to the same tokens, .'embed_tokens': \[5, 3"
        ):
            CausalLMLayers(models["llama"], adapter=lora)


def test_resumed_in_two_stages_after_a_start(workers: Workers, tmp_path: Path) -> None:
    make_model(tmp_path / "model", Case("rows", tied=True), SCALE)
    by_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter", TOKENS)
    options = {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}
    lora = LoRA(4, init_from=str(tmp_path / "adapter"), **options)
    model, half, whole = (str(tmp_path / name) for name in ("model", "half.ckpt", "whole.ckpt"))
    (expected,) = workers.run(1, resume, model, lora, 1, whole, 2, False)
    (middle,) = workers.run(1, resume, model, lora, 1, half, 1, False)
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert 0 < (middle[rows] - start[rows]).abs().max() < 5 * LR
    for adapter in (lora, LoRA(4, **options)):  # also without the adapter's directory
        found = workers.run(2, resume, model, adapter, 2, half, 2, True)[0]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert (expected[rows] - middle[rows]).abs().max() > 0.1 * LR


@pytest.mark.parametrize(
    ("kind", "rows", "told"),
    [
        ("llama", [], "names no token"),
        ("llama", {}, "names no module"),
        ("llama", [-1], "has -1; give token ids of 0 or more"),
        ("llama", [4, 4], "has the token 4 twice"),
        ("llama", [3, 128], "has only 128 rows, for tokens 0 to 127; add rows with transformers'"),
        ("llama", {"wte": [3]}, "names wte, but only rows of embed_tokens and lm_head can be trained"),
        ("llama_tied", {"lm_head": [3]}, "whose weights are tied in .*; give one list for both"),
        ("llama_tied", {"lm_head": [3], "embed_tokens": [4]}, "names different tokens for .*, whose weights are"),
    ],
    ids=str,
)
def test_refused(models: dict[str, Path], kind: str, rows: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        CausalLMLayers(models[kind], adapter=LoRA(2, trainable_token_indices=rows))


def test_a_head_with_a_bias_which_peft_leaves_out(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(PhiConfig(**SIZES)).save_pretrained(tmp_path)
    lora = LoRA(2, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    with pytest.raises(
        ConfigurationError, match=r"type phi, as PEFT computes something else .*, as in {embed_tokens: \[5"
    ):
        CausalLMLayers(tmp_path, adapter=lora)
    CausalLMLayers(tmp_path, adapter=LoRA(2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]}))


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_a_plan_counts_the_rows_and_no_more(models: dict[str, Path], kind: str) -> None:
    def planned(rows: Any) -> list[Any]:
        lora = LoRA(2, target_modules=["q_proj"], trainable_token_indices=rows)
        layers = CausalLMLayers(models[kind], adapter=lora, activation_memory="keep", fuse_head=True)
        simulation = Simulation(layers, CausalLMLoss(), partial(torch.optim.Adam, lr=1e-3))
        return list(Planner(simulation, micro_batches=2, sequence_len=32).stages([0, 2, 4], "keep"))

    count = len(TOKENS) * 64
    for without, with_rows in zip(planned(None), planned(TOKENS), strict=True):
        assert with_rows.trained - without.trained == count
        assert with_rows.gradients - without.gradients >= 4 * count
        assert 0 < with_rows.total - without.total < 32 * 1024  # the size of the weight in float32


def test_the_next_token_of_a_head_that_is_left_to_the_loss() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(1, 2, 4), torch.randn(9, 4), torch.randn(9)
    rows = torch.tensor([6]), 9 * hidden[0, 1:]
    labels = torch.tensor([[-100, 0]])
    token, _ = _next_token(HeadInputs(hidden, weight, bias, 1.0, None, rows), labels)
    assert token == 6
    assert _next_token(HeadInputs(hidden, weight, bias, 1.0, None), labels)[0] != 6
