"""A plan needs only config.json, and is the same with an index beside it and with the complete files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.cli.plan_command import plan
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.disk_size import disk_size
from plan_cases import write_config

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "qwen3": {**SIZES, "vocab_size": 512, "num_hidden_layers": 4, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {**SIZES, "vocab_size": 512, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 64, "tie_word_embeddings": False},
}  # fmt: skip


@pytest.fixture(params=MODELS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "whole", max_shard_size="100KB"
    )
    return tmp_path / "whole"


def part_of(whole: Path, *keep: str) -> Path:
    directory = whole.parent / "part"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in keep:
        shutil.copy(whole / name, directory)
    return directory


def planned(model_dir: Path, **options: object) -> str:
    told = str(plan(str(write_config(model_dir.parent / "c.yaml", model_dir, 2, **options)), 2, "2GiB"))
    _, _, rest = told.replace(str(model_dir), "DIR").partition("\n")  # the first line states the size on disk
    return rest


def test_the_answer_is_the_same(whole: Path, request: pytest.FixtureRequest) -> None:
    options = {"load_in_4bit": "moe" in request.node.name}
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    index = "model.safetensors.index.json"
    assert len(shards) > 2
    expected = planned(whole, **options)
    assert "pipeline_stages" in expected
    for kept in (["config.json"], ["config.json", index, shards[1]]):
        assert planned(part_of(whole, *kept), **options) == expected


def test_the_size_on_disk(whole: Path) -> None:
    def size(directory: Path) -> str:
        layers = CausalLMLayers(directory, adapter=LoRA(4), needs_weights=False)
        return str(disk_size(layers.meta_model))

    index, shards = "model.safetensors.index.json", sorted(whole.glob("*.safetensors"))
    files = sum(path.stat().st_size for path in shards)
    tensors = json.loads((whole / index).read_text())["metadata"]["total_size"]
    assert size(whole) == f"{files / 1e6:.1f} MB on disk"
    assert size(part_of(whole, "config.json", index)) == f"{tensors / 1e6:.1f} MB to download"
    one = shards[0].stat().st_size
    unit = f"{one / 1e6:.1f} MB" if one >= 1e5 else f"{one / 1e3:.1f} kB"
    some = size(part_of(whole, "config.json", index, shards[0].name))
    assert some == f"{tensors / 1e6:.1f} MB to download, {unit} of it already on disk"
    assert size(part_of(whole, "config.json")) == f"about {tensors / 1e6:.1f} MB to download"


def test_a_damaged_file_is_no_missing_one(whole: Path) -> None:
    index, shard = "model.safetensors.index.json", min(whole.glob("*.safetensors")).name
    directory = part_of(whole, "config.json", index, shard)
    (directory / shard).write_bytes((directory / shard).read_bytes()[:-8])
    with pytest.raises(ConfigurationError, match="its header requires"):
        planned(directory)


def test_a_training_needs_the_files(whole: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has neither model.safetensors nor"):
        CausalLMLayers(part_of(whole, "config.json"), adapter=LoRA(4))
