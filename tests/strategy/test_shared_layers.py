"""The model directory of benchmarks/scaling.py, whose layers share weights, loads like a plain one, but is sparse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.fingerprint import fingerprint
from shared_layers import read_shared, write_shared

SHAPE = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def test_layers_have_the_weights_of_the_drawn_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_utils

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", transformers.modeling_utils.safe_open)
    write_shared(tmp_path, SHAPE, torch.device("cpu"))
    shards = sorted(tmp_path.glob("model-layer-*.safetensors"))
    assert len(shards) == 6
    assert sum(path.stat().st_blocks * 512 for path in shards) < shards[0].stat().st_size
    fingerprint(tmp_path)  # reads all headers
    read_shared(tmp_path)
    layers = CausalLMLayers(tmp_path, adapter=LoRA(rank=2))
    weights = {}
    for start in range(6):
        stage = layers.build_stage(start, start + 1, torch.device("cpu"))
        state = stage.causal_lm.state_dict()
        weights[start] = {
            name.replace(f"layers.{start}.", ""): tensor
            for name, tensor in state.items()
            if f"layers.{start}." in name and "lora" not in name
        }
    assert len(weights[0]) == 9
    for name, tensor in weights[0].items():
        assert torch.equal(weights[4][name], tensor)
        assert torch.equal(weights[3][name], weights[1][name])
        assert not torch.equal(weights[1][name], tensor)
        assert tensor.float().std() > 0.01
