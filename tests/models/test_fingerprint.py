"""Fingerprints distinguish bases, however the weights are stored and whatever unused files lie beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_pipelite.adapters import Adapter, ControlAdapter, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.fingerprint import BASE_FILE, fingerprint, refuse_another_base
from own_code import write_own
from tiny_models import CPU, write_model


def test_checkpoints_of_version_0_1_know_their_base(tmp_path: Path) -> None:
    """The value is what that version wrote into its checkpoints for these files."""
    config = {"model_type": "llama", "hidden_size": 4, "use_cache": True, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {"a.weight": torch.arange(8.0).reshape(2, 4), "b.weight": torch.ones(3, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == "c888faed9bc966a1655c3a336aaeaab81e9db65e2bb76d9ac379031e1710597e"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", "llama")


def test_of_a_directory_the_files_that_the_index_names_count(base: Path, tmp_path: Path) -> None:
    whole = fingerprint(base)
    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(shards, max_shard_size="100kB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    shutil.copy(base / "config.json", shards)
    assert fingerprint(shards) == whole
    save_file({"model.norm.weight": torch.zeros(64)}, shards / "consolidated.safetensors")
    assert fingerprint(shards) == whole
    changed = load_file(base / "model.safetensors")
    changed["model.embed_tokens.weight"][0, 0] += 1
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(base) != whole


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_count_as_what_they_are(base: Path, zipped: bool) -> None:
    whole, weights = fingerprint(base), load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert fingerprint(base) == whole
    torch.save({**weights, "lm_head.weight": torch.zeros(128, 64)}, base / "pytorch_model.bin")
    assert fingerprint(base) != whole


def test_code_of_its_own_counts(tmp_path: Path) -> None:
    before = fingerprint(write_own(tmp_path / "base"))
    (tmp_path / "base" / "unnamed.py").write_text("")
    assert fingerprint(tmp_path / "base") == before
    (tmp_path / "base" / "own_number.py").write_text("NUMBER = 2.0\n")
    assert fingerprint(tmp_path / "base") != before


@pytest.mark.parametrize("adapter", [LoRA(2), ControlAdapter(2)], ids=lambda adapter: type(adapter).__name__)
def test_an_adapter_tells_its_base(base: Path, tmp_path: Path, adapter: Adapter) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=adapter)
    adapter.save(tmp_path / "adapter", [layers.trained_state(layers.build_stage(0, 4, CPU))], layers.meta_model)
    base.rename(tmp_path / "moved")
    refuse_another_base(tmp_path / "adapter", tmp_path / "moved")
    other = write_model(base, "llama")  # in the same place, but another base
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"another base .*allow_another_base"):
        refuse_another_base(tmp_path / "adapter", other)


def test_an_adapter_of_peft_names_its_base(base: Path, tmp_path: Path) -> None:
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=LoRA(2))
    layers.adapter.save(tmp_path / "adapter", [layers.trained_state(layers.build_stage(0, 4, CPU))], layers.meta_model)
    (tmp_path / "adapter" / BASE_FILE).unlink()
    refuse_another_base(tmp_path / "adapter", base)
    other = write_model(tmp_path / "other", "qwen3")
    with pytest.raises(ConfigurationError, match=f"names {base}"):
        refuse_another_base(tmp_path / "adapter", other)
    shutil.rmtree(base)
    refuse_another_base(tmp_path / "adapter", other)  # the base that it names is gone, so there is nothing to compare
