"""The gpt-oss that benchmarks write has the same weights in MXFP4 as in bf16, which transformers can load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_pipelite.models.stored.known import stored_format
from lightning_pipelite.models.stored.weights import StoredWeights
from random_mxfp4 import SCALE, write_gpt_oss
from tiny_models import SIZES

GPT_OSS = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}


def test_both_formats_are_one_model(tmp_path: Path) -> None:
    for name in ("mxfp4", "bf16"):
        size = write_gpt_oss(tmp_path / name, GPT_OSS, mxfp4=name == "mxfp4")
        files = list((tmp_path / name).glob("*.safetensors"))
        assert len(files) == 1 + SIZES["num_hidden_layers"]  # type: ignore[operator]
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert size == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    stored = StoredWeights(tmp_path / "mxfp4", stored_format(tmp_path / "mxfp4"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    expected: dict[str, Tensor] = whole.state_dict()
    assert stored.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(stored.read(name), tensor, rtol=0, atol=0, msg=name)
    experts = [expected[f"model.layers.{number}.mlp.experts.down_proj"] for number in range(4)]
    assert torch.equal(experts[1][0], experts[0][1])
    assert torch.equal(experts[3], experts[0])
    assert all(0.5 * SCALE < float(each.float().std()) < 2 * SCALE for each in experts)
