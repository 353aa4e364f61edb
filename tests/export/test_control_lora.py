"""Control Adapters as LoRAs: exact where that is possible, measured where it is not, undone by the inverse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export_cases import BASES, load, logits, with_adapter, with_control, write_base, write_control_adapter
from lightning_pipelite.adapters.control_files import ControlAdapterFile
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import control_to_lora, merge
from lightning_pipelite.export.residual_writers import find_writers

LAYER = "model.layers.1"
DOWN, OUT = ".mlp.down_proj.weight", ".self_attn.o_proj.weight"
EXPERTS = ".mlp.experts.down_proj"
# The weights that write last to the residual stream of layer 1, and those that write earlier, from the models' code.
WRITERS = {
    "llama": ([DOWN], [OUT]),
    "qwen3": ([DOWN], [OUT]),
    "phi3": ([DOWN], [OUT]),
    "cohere": ([OUT, DOWN], []),
    "phi": ([".self_attn.dense.weight", ".mlp.fc2.weight"], []),
    "mixtral": ([EXPERTS], [OUT]),
    "qwen3_moe": ([EXPERTS], [OUT]),
    "gpt_oss": ([EXPERTS], [OUT]),
    "starcoder2": ([".mlp.c_proj.weight"], [OUT]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_are_found(kind: str) -> None:
    found = find_writers(BASES[kind], [LAYER])[LAYER]
    for writers, wanted in zip((found.last, found.first), WRITERS[kind], strict=True):
        assert [each.weight.removeprefix(LAYER) for each in writers] == wanted
        biased = kind in ("phi", "starcoder2", "gpt_oss")
        assert all((each.bias is not None) == biased for each in writers)
        assert all(each.transposed == (kind == "gpt_oss" and "experts" in each.weight) for each in writers)


def test_shared_experts_and_dense_layers_are_found() -> None:
    found = find_writers(BASES["qwen2_moe"], ["model.layers.0", LAYER])
    assert [each.weight for each in found["model.layers.0"].last] == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
    ]
    assert [each.weight for each in found[LAYER].last] == [LAYER + DOWN]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_a_norm_behind_the_writers_is_refused(kind: str, tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", kind), write_control_adapter(tmp_path / "control")
    with pytest.raises(ConfigurationError, match="does not just add the products of its weights"):
        control_to_lora(str(base), str(control), str(tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("kind", ["cohere", "phi"])
@pytest.mark.parametrize("inverse", [False, True])
def test_parallel_blocks_give_the_control_adapters_logits(kind: str, inverse: bool, tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", kind), write_control_adapter(tmp_path / "control", numbers=(0, 2))
    told = control_to_lora(str(base), str(control), str(tmp_path / "lora"), inverse)
    assert told.startswith("Exact")
    wanted = with_control(base, control, -1 if inverse else 1)
    assert (wanted - logits(load(base))).abs().max() > 5e-3
    assert torch.allclose(with_adapter(base, tmp_path / "lora"), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_sequential_blocks_take_the_nearer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, control = write_base(tmp_path / "base", kind), write_control_adapter(tmp_path / "control")
    told = control_to_lora(str(base), str(control), str(tmp_path / "nearer"))
    measured = {name: float(each) for name, each in re.findall(r"(last|all) .*KL divergence (\S+) nats", told)}
    taken = re.search(r"--writers (\w+)", told)
    assert taken is not None
    assert taken[1] == min(measured, key=lambda name: measured[name])
    # The same measurement on the same tokens, with PEFT and with the adapter's definition.
    monkeypatch.setattr("export_cases.INPUT_IDS", _tokens(BASES[kind].vocab_size))
    wanted = with_control(base, control, 1).double().log_softmax(-1)
    for name, value in measured.items():
        control_to_lora(str(base), str(control), str(tmp_path / name), writers=name)  # type: ignore[arg-type]
        found = with_adapter(base, tmp_path / name).double().log_softmax(-1)
        assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) == pytest.approx(value, rel=0.01)
    same = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("nearer", taken[1])]
    assert same[0].keys() == same[1].keys()
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def _tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 128), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "cohere", "mixtral"])
@pytest.mark.parametrize("writers", ["last", "all"])
def test_the_inverse_on_the_merged_model_gives_the_model_back(kind: str, writers: Any, tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", kind), write_control_adapter(tmp_path / "control")
    there, back = tmp_path / "there", tmp_path / "back"
    control_to_lora(str(base), str(control), str(tmp_path / "lora"), writers=writers)
    merge(str(base), str(tmp_path / "lora"), str(there))
    control_to_lora(str(there), str(control), str(tmp_path / "inverse"), inverse=True, writers=writers)
    merge(str(there), str(tmp_path / "inverse"), str(back))
    before, between, after = (load_file(each / "model.safetensors") for each in (base, there, back))
    changed = [name for name in before if not torch.equal(before[name], between[name])]
    assert changed
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)
    assert max(float((between[name] - before[name]).abs().max()) for name in changed) > 0.05


def test_factors_are_exact_and_of_the_adapters_rank(tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", "llama"), write_control_adapter(tmp_path / "control", rank=3)
    control_to_lora(str(base), str(control), str(tmp_path / "lora"), writers="last")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 3, ["down_proj"])
    adapter, weights = load_file(control / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    key = "base_model.model.model.layers.2"
    q, s = adapter[f"{key}.control_Q"], adapter[f"{key}.control_S"]
    wanted = q @ torch.diag(torch.exp(s) - 1) @ q.T @ weights["model.layers.2.mlp.down_proj.weight"]
    a, b = (tensors[f"{key}.mlp.down_proj.lora_{letter}.weight"] for letter in "AB")
    assert a.shape == (3, 128)
    assert torch.allclose(b @ a, wanted, atol=1e-5)


def test_the_older_files_of_qlora_pipe_lite(tmp_path: Path) -> None:
    """The older files hold A and B instead of Q and S, claim to be LoRAs, and may be pickled."""
    generator = torch.Generator().manual_seed(0)
    a, b = 0.2 * torch.randn(4, 64, generator=generator), 0.2 * torch.randn(64, 4, generator=generator)
    key = "base_model.model.model.layers.0.control_"
    tmp_path.joinpath("adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    torch.save({f"{key}A.weight": a, f"{key}B.weight": b}, tmp_path / "adapter_model.bin")
    transform = ControlAdapterFile(tmp_path).transforms[0]
    for inverse in (False, True):
        left, right = transform.factors(inverse=inverse)
        whole = torch.eye(64) + b @ a
        wanted = torch.linalg.inv(whole) if inverse else whole
        assert torch.allclose(torch.eye(64) + left @ right, wanted, atol=1e-5)


KEY = "base_model.model.model.layers.0.control_"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "layer": (lambda t: t.update({f"{KEY}Q".replace("0", "7"): t.pop(f"{KEY}Q")}), "layer 0 has control_S"),
    "shape": (lambda t: t.update({f"{KEY}S": torch.zeros(5)}), r"control_S \[5\]"),
    "width": (
        lambda t: (t.clear(), t.update({f"{KEY}Q": torch.eye(32, 2), f"{KEY}S": torch.zeros(2)})),
        "for layers of width 32, but those of .* have 64",
    ),
    "depth": (
        lambda t: (
            t.clear(),
            t.update({f"{KEY}Q".replace("0", "9"): torch.eye(64, 2), f"{KEY}S".replace("0", "9"): torch.zeros(2)}),
        ),
        "transforms model.layers.9, which .* does not have",
    ),
    "other": (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}), "not part of a Control Adapter"),
    "finite": (lambda t: t.update({f"{KEY}S": torch.full((4,), torch.nan)}), "not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    change, says = REFUSED[case]
    base, control = write_base(tmp_path / "base", "llama"), write_control_adapter(tmp_path / "control")
    tensors = load_file(control / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, control / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=says):
        control_to_lora(str(base), str(control), str(tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


def test_experts_with_a_bias_are_refused(tmp_path: Path) -> None:
    base, control = write_base(tmp_path / "base", "gpt_oss"), write_control_adapter(tmp_path / "control")
    with pytest.raises(ConfigurationError, match="have a bias"):
        control_to_lora(str(base), str(control), str(tmp_path / "lora"), writers="last")
