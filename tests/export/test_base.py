"""Reading and writing parameters by their names in the model, whatever the files call them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma3Config

from export_cases import BASES, load, write_base
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.base import BaseModel


def test_pickled_weights_are_refused_with_what_can_be_done(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    torch.save(load(base).state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"only pickled weights \(\.bin\); save it with transformers"):
        BaseModel(base)


@pytest.mark.parametrize("kind", BASES)
def test_parameters_are_those_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    directory = write_base(tmp_path / "base", kind, max_shard_size="200kB")
    base, model = BaseModel(directory), load(directory)
    parameters = dict(model.named_parameters())
    assert base.groups.keys() >= parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(base.read_parameter(name), parameter.data, rtol=0, atol=0)
        group = base.group_of(name)
        base.check_round_trip(group)
        assert base.split(group, base.read(group)).keys() == group.files.keys()


def test_the_text_model_of_a_multimodal_one(tmp_path: Path) -> None:
    config = Gemma3Config(
        # The multimodal class ignores the cap; with one, the text model on its own would be a different model.
        text_config={**BASES["gemma3"].to_dict(), "final_logit_softcapping": None},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path / "base")
    base = BaseModel(tmp_path / "base")
    assert base.is_text_part
    name = "layers.1.mlp.down_proj.weight"
    wanted = next(p for n, p in whole.named_parameters() if n.endswith(name) and "vision" not in n)
    torch.testing.assert_close(base.read_parameter(f"model.{name}"), wanted.data, rtol=0, atol=0)


def test_a_base_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "base", "llama")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"also holds an adapter_config\.json"):
        BaseModel(directory)
    (directory / "adapter_config.json").unlink()
    (directory / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="not a readable safetensors file"):
        BaseModel(directory)


@pytest.mark.slow
def test_neither_lightning_nor_deepspeed_is_imported() -> None:
    program = (
        "import sys, lightning_pipelite.export as e; "
        "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning', 'deepspeed')); "
        "sys.exit(bad[0] if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
