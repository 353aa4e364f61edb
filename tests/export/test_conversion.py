"""Checkpoints are converted to adapters or models, and no code in them is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from export_cases import load, logits, with_adapter, with_control, write_adapter, write_base, write_control_adapter
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import convert
from lightning_pipelite.export.from_checkpoint import _said_by
from tiny_models import SIZES

LAYERS = 4


def _config(tmp_path: Path, base: Path, more: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(
        f"model_dir = '{base}'\noutput_dir = 'o'\nlr = 1e-4\nsequence_len = 64\n{more}\n"
        "[[datasets]]\ndataset_path = 'a.json'\n"
    )
    return path


def _write_layers(run: Path, items: dict[int, dict[str, Tensor]]) -> Path:
    """Write files as DeepSpeed's pipeline does: one per pipeline item, and one with the engine's state."""
    directory = run / "global_step3"
    directory.mkdir(parents=True)
    (run / "latest").write_text("global_step3")
    for number in range(LAYERS + 5):
        torch.save(items.get(number, {}), directory / f"layer_{number:02d}-model_states.pt")
    torch.save({"module": None}, directory / "mp_rank_00_model_states.pt")
    return directory


def _by_layer(tensors: dict[str, Tensor], default: str) -> dict[int, dict[str, Tensor]]:
    items: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.removeprefix("base_model.model.model.layers.").split(".", 1)
        name = name if "control" in name else "orig." + name.replace(".weight", f"{default}.weight")
        items.setdefault(int(number) + 2, {})[name] = tensor
    return items


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_a_lora(layers: list[int] | None, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    options = {"layers_to_transform": layers} if layers else {}
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"], **options)
    items = _by_layer(load_file(adapter / "adapter_model.safetensors"), ".default")
    # Checkpoints of 4-bit weights also hold their quantisation statistics.
    items[3]["orig.self_attn.q_proj.base_layer.weight.absmax"] = torch.ones(3)
    _write_layers(tmp_path / "run", items)
    told = convert(
        str(tmp_path / "run"), str(tmp_path / "out"), str(_config(tmp_path, base, "lora_rank = 4\nlora_alpha = 8"))
    )
    assert "alpha = 8" in told
    assert torch.equal(with_adapter(base, tmp_path / "out"), with_adapter(base, adapter))


def test_without_lora_alpha_it_is_the_rank_and_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    run = _write_layers(tmp_path / "run", _by_layer(load_file(adapter / "adapter_model.safetensors"), ".default"))
    told = convert(str(run), str(tmp_path / "out"), str(_config(tmp_path, base, "lora_rank = 4")))
    assert "alpha = rank = 4" in told
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4


def test_a_control_adapter(tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", "llama"), write_control_adapter(tmp_path / "control")
    run = _write_layers(tmp_path / "run", _by_layer(load_file(control / "adapter_model.safetensors"), ""))
    config = _config(tmp_path, base, "lora_rank = 4\nuse_control_adapters = true")
    convert(str(run), str(tmp_path / "out"), str(config))
    assert torch.equal(with_control(base, tmp_path / "out", 1), with_control(base, control, 1))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "llama_tied"])
def test_a_whole_model_of_which_some_layers_were_trained(kind: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind, max_shard_size="100kB")
    trained = {name: tensor for shard in base.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    trained = {name: tensor + 0.1 for name, tensor in trained.items() if "layers.0." not in name}
    items: dict[int, dict[str, Tensor]] = {}
    for name, tensor in trained.items():
        if name.startswith("model.layers."):
            number, inside = name.removeprefix("model.layers.").split(".", 1)
            items.setdefault(int(number) + 2, {})[f"orig.{inside}"] = tensor
    items[1] = {"orig.weight": trained["model.embed_tokens.weight"]}
    items[LAYERS + 2] = {"orig.weight": trained["model.norm.weight"]}
    items[LAYERS + 3] = (
        {"orig.weight": items[1]["orig.weight"]}
        if kind == "llama_tied"
        else {"lm_head.weight": trained["lm_head.weight"]}
    )
    run = _write_layers(tmp_path / "run", items)
    convert(str(run), str(tmp_path / "out"), str(_config(tmp_path, base, "full_fine_tune = true")))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    before, after = (
        {n: t for s in each.glob("*.safetensors") for n, t in load_file(s).items()} for each in (base, tmp_path / "out")
    )
    torch.testing.assert_close(after, {**before, **trained}, atol=0, rtol=0)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def _multimodal_base(directory: Path) -> Path:
    torch.manual_seed(0)
    text = Gemma3TextConfig(**SIZES, sliding_window=4)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision_config = SiglipVisionConfig(**vision, image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=vision_config, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("whole", [True, False])
def test_the_text_model_of_a_base_with_images(whole: bool, tmp_path: Path) -> None:
    base = _multimodal_base(tmp_path / "base")
    before, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(1)
    if whole:
        norms = {number: torch.randn(64, generator=generator) for number in range(LAYERS)}
        items = {number + 2: {"orig.input_layernorm.weight": norm} for number, norm in norms.items()}
        config = _config(tmp_path, base, "full_fine_tune = true")
    else:
        shapes = {"A": (4, 64), "B": (128, 4)}
        items = {
            number + 2: {
                f"orig.mlp.up_proj.lora_{each}.default.weight": torch.randn(shape, generator=generator)
                for each, shape in shapes.items()
            }
            for number in range(LAYERS)
        }
        config = _config(tmp_path, base, "lora_rank = 4")
    run = _write_layers(tmp_path / "run", items)
    convert(str(run), str(tmp_path / "out"), str(config))
    if whole:
        after = load_file(tmp_path / "out" / "model.safetensors")
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert len(changed) == LAYERS
        for name in changed:
            given = norms[int(name.split(".layers.")[1].split(".")[0])]
            torch.testing.assert_close(after[name], given, rtol=0, atol=0)
    else:
        assert (with_adapter(base, tmp_path / "out") - logits(load(base))).abs().max() > 1e-2
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert len(saved) == LAYERS * len(shapes)
        for name, tensor in saved.items():
            number, inside = name.split(".layers.")[1].split(".", 1)
            given = items[int(number) + 2][f"orig.{inside.removesuffix('.weight')}.default.weight"]
            torch.testing.assert_close(tensor, given, atol=0, rtol=0)


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("hostile",)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_base(tmp_path / "base", "llama")
    run = _write_layers(tmp_path / "run", {})
    torch.save(_Hostile(), run / "layer_03-model_states.pt")
    with pytest.raises(ConfigurationError, match=r"layer_03-model_states\.pt cannot be read as plain weights"):
        convert(str(run), str(tmp_path / "out"), str(_config(tmp_path, base, "lora_rank = 4")))
    assert not (tmp_path / "hostile").exists()
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    config = _config(tmp_path, base, "lora_rank = 4")
    with pytest.raises(ConfigurationError, match="is not a directory"):
        convert(str(tmp_path / "nowhere"), str(tmp_path / "out"), str(config))
    run = _write_layers(tmp_path / "run", {})
    with pytest.raises(ConfigurationError, match="does not exist; give the configuration"):
        convert(str(run), str(tmp_path / "out"), str(tmp_path / "none.toml"))
    with pytest.raises(ConfigurationError, match="holds no adapter"):
        convert(str(run), str(tmp_path / "out"), str(config))
    torch.save({"orig.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 64)}, run / "layer_02-model_states.pt")
    with pytest.raises(ConfigurationError, match=r"lacks|does not fit"):
        convert(str(run), str(tmp_path / "out"), str(config))
    torch.save({"orig.weight": torch.zeros(3)}, run / "layer_01-model_states.pt")
    with pytest.raises(ConfigurationError, match=r"holds orig.weight with shape \[3\]"):
        convert(str(run), str(tmp_path / "out"), str(_config(tmp_path, base, "full_fine_tune = true")))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_names_no_code_of_others(tmp_path: Path) -> None:
    meta = {
        "identity": {
            "adapter": {"class_path": "os.system", "init_args": {}},
            "dtype": "float32",
            "load_in_4bit": False,
        },
        "hyper_parameters": {"model_dir": "base"},
    }
    with pytest.raises(ConfigurationError, match=r"os\.system.*give the YAML"):
        _said_by(meta, tmp_path)
