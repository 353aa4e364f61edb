"""Merging: what the merged model computes, what its files look like, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from export_cases import ADAPTERS, FUSED, load, logits, with_adapter, write_adapter, write_base
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import merge

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": FUSED}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    **{name: ("llama", options, "5GB") for name, options in ADAPTERS.items()},
    "tied": ("llama_tied", ADAPTERS["all_linear"], "5GB"),
    "sharded": ("qwen3", ADAPTERS["all_linear"], "150kB"),
    "parallel": ("cohere", ADAPTERS["all_linear"], "5GB"),
    "transposed": ("gpt2", ADAPTERS["all_linear"], "5GB"),
    "bias": ("starcoder2", {"target_modules": ["o_proj", "c_proj"], "lora_bias": True}, "5GB"),
    "bias_lora_only": ("starcoder2", {"target_modules": ["q_proj"], "bias": "lora_only"}, "5GB"),
    "mixtral": ("mixtral", EXPERTS, "100kB"),
    "qwen3_moe": ("qwen3_moe", EXPERTS, "5GB"),
    "gpt_oss": ("gpt_oss", EXPERTS, "100kB"),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_base_and_adapter(case: str, tmp_path: Path) -> None:
    kind, options, shards = CASES[case]
    base = write_base(tmp_path / "base", kind, max_shard_size=shards)
    adapter = write_adapter(tmp_path / "adapter", base, **options)
    merge(str(base), str(adapter), str(tmp_path / "merged"))
    wanted, before = with_adapter(base, adapter), logits(load(base))
    assert (wanted - before).abs().max() > 0.1
    assert torch.allclose(logits(load(tmp_path / "merged")), wanted, atol=1e-5, rtol=1e-5)


def test_experts_of_the_layout_before_transformers_5(tmp_path: Path) -> None:
    """An adapter saved for separate Linear modules of the experts, which PEFT converts to one for fused weights."""
    base = write_base(tmp_path / "base", "mixtral")
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for layer, expert in itertools.product(range(4), range(4)):
        for name, (rows, columns) in {"w1": (128, 64), "w2": (64, 128), "w3": (128, 64)}.items():
            module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            added[f"{module}.weight"] = b @ a
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    before = load_file(base / "model.safetensors")
    merge(str(base), str(adapter), str(tmp_path / "merged"))
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert added.keys() <= before.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor + added.get(name, 0), atol=1e-5)


def test_files_keep_layout_types_and_metadata(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", max_shard_size="100kB", dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merged = tmp_path / "merged"
    merge(str(base), str(adapter), str(merged))
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    lora = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as before, safe_open(merged / shard.name, "pt") as after:
            assert list(before.keys()) == list(after.keys())
            assert before.metadata() == after.metadata() == {"format": "pt"}
            for name in before.keys():  # noqa: SIM118
                wanted = before.get_tensor(name)
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                if f"{key}A.weight" in lora:
                    changed += 1
                    wanted = (wanted.float() + 2 * lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]).bfloat16()
                torch.testing.assert_close(after.get_tensor(name), wanted, atol=0, rtol=0)
    assert changed == 4


def test_several_adapters_each_with_its_scale(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    first = write_adapter(tmp_path / "first", base, seed=1, target_modules=["q_proj", "o_proj"])
    second = write_adapter(tmp_path / "second", base, seed=2, rank=3, target_modules=["o_proj"])
    merge(str(base), [str(first), str(second)], str(tmp_path / "merged"), [0.5, -1.5])
    before, after = (load_file(each / "model.safetensors") for each in (base, tmp_path / "merged"))
    for name, tensor in before.items():
        wanted = tensor.clone()
        for adapter, by in ((first, 0.5 * 8 / 4), (second, -1.5 * 8 / 3)):
            lora, key = load_file(adapter / "adapter_model.safetensors"), f"base_model.model.{name[:-7]}.lora_"
            if f"{key}A.weight" in lora:
                wanted += by * lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
        assert torch.allclose(after[name], wanted, atol=1e-6)


@pytest.mark.parametrize("older", [False, True])  # older versions of transformers keep the template there
def test_the_chat_template_of_the_training_is_the_merged_tokenizers(older: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, **ADAPTERS["all_linear"])
    with pytest.raises(
        ConfigurationError, match=r"base has no tokenizer to save chat_template with; leave chat_template"
    ):
        merge(str(base), str(adapter), str(tmp_path / "merged"), chat_template="alpaca")
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(base)
    if older:
        written = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps({**written, "chat_template": "none"}))
    merge(str(base), str(adapter), str(tmp_path / "merged"), chat_template="alpaca")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert asked == "### Instruction:\nWho?\n\n"
    assert "chat_template" not in json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())


def test_a_kill_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "llama", max_shard_size="100kB")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    module = sys.modules["lightning_pipelite.export.merging"]
    write = module.write_shard

    def slowly(*arguments: Any) -> None:
        write(*arguments)
        time.sleep(0.05)

    monkeypatch.setattr(module, "write_shard", slowly)
    moments = random.Random(0)
    unfinished = 0
    for number in range(6):
        output = tmp_path / f"output{number}"
        child = os.fork()
        if child == 0:
            merge(str(base), str(adapter), str(output))
            os._exit(0)
        while not any(tmp_path.glob(f".output{number}.*.partial")):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert not output.exists()
        for partial in tmp_path.glob(f".output{number}.*.partial"):
            unfinished += 1
            with pytest.raises(Exception, match=r"config\.json|does not appear|not a valid|Unrecognized"):
                load(partial)
    assert unfinished == 6


def _other_base(tmp_path: Path, base: Path, adapter: Path) -> dict[str, Any]:
    return {"base": str(write_base(tmp_path / "other", "qwen2_moe"))}


def _edit(change: Any) -> Any:
    def edit(tmp_path: Path, base: Path, adapter: Path) -> dict[str, Any]:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
        return {}

    return edit


LAYER = "base_model.model.model.layers"
REFUSED: dict[str, tuple[Any, str]] = {
    "scale": (lambda *_: {"scale": 2.0}, "scale must be greater than -2 and less than 2, not 2"),
    "scales": (lambda *_: {"scale": [0.5, 0.5]}, "the number of scales is 2, but that of adapters is 1"),
    "full": (lambda t, b, a: {"output": str(a)}, "overlap"),
    "inside": (lambda t, b, a: {"output": str(b / "merged")}, "overlap"),
    "other base": (_other_base, "was trained on another base than .*other.* names .*/base"),
    "no adapter": (lambda t, b, a: {"adapter": str(a / "nowhere")}, "has no adapter_config.json"),
    "no base": (lambda t, b, a: {"base": str(t / "nowhere")}, "is not a directory"),
    "unused": (
        _edit(
            lambda t: t.update(
                {
                    f"{LAYER}.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64),
                    f"{LAYER}.9.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
                }
            )
        ),
        "holds .*layers.9.*, for which .* has no place",
    ),
    "missing": (_edit(lambda t: t.pop(f"{LAYER}.2.self_attn.q_proj.lora_B.weight")), "lacks .*layers.2.*q_proj.lora_B"),
    "shape": (
        _edit(lambda t: t.update({f"{LAYER}.2.self_attn.q_proj.lora_B.weight": torch.zeros(65, 4)})),
        "does not fit .*size mismatch",
    ),
    "not finite": (
        _edit(lambda t: t.update({f"{LAYER}.2.self_attn.q_proj.lora_B.weight": torch.full((64, 4), torch.inf)})),
        "is not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    change, says = REFUSED[case]
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    options = {"base": str(base), "adapter": str(adapter), "output": str(tmp_path / "merged")}
    options |= change(tmp_path, base, adapter)
    with pytest.raises(ConfigurationError, match=says):
        merge(**options)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_tied_weights_and_scaled_doras_are_refused(tmp_path: Path) -> None:
    tied = write_base(tmp_path / "tied", "llama_tied")
    head = write_adapter(tmp_path / "head", tied, target_modules=["embed_tokens"])
    with pytest.raises(ConfigurationError, match="ties to another weight"):
        merge(str(tied), str(head), str(tmp_path / "merged"))
    base = write_base(tmp_path / "base", "llama")
    dora = write_adapter(tmp_path / "dora", base, **ADAPTERS["dora"])
    with pytest.raises(ConfigurationError, match="is a DoRA, which cannot be scaled"):
        merge(str(base), str(dora), str(tmp_path / "merged"), 0.5)
    with pytest.raises(ConfigurationError, match="is a DoRA, which cannot be combined with other adapters"):
        merge(str(base), [str(dora), str(dora)], str(tmp_path / "merged"))


def test_initialisations_that_change_the_base_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], init_lora_weights="pissa")
    assert PeftModel.from_pretrained(load(base), adapter)
    with pytest.raises(ConfigurationError, match="initialised with pissa"):
        merge(str(base), str(adapter), str(tmp_path / "merged"))
