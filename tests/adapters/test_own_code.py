"""Options for loading a base also hold for saving: code of its own, pickled weights, double quantisation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pipelite import PipeLiteModule
from lightning_pipelite.adapters import Adapter, ControlAdapter, Full, LoRA, full, lora
from lightning_pipelite.cli.check_command import check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import analyze, control_to_lora, convert, merge
from lightning_pipelite.export import from_checkpoint as own_checkpoint
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.shared.topology import Topology
from own_code import FILES, change, write_own
from tiny_models import POSITIONS, build, micro_batches, run_stages, write_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_own(tmp_path / "base")


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    (input_ids, _), _ = micro_batches()
    return model(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits


@torch.no_grad()
def train(base: Path, adapter: Adapter) -> tuple[CausalLMLayers, list[Any], Tensor]:
    """Change the trained parameters; return the layers, the stages and their new logits."""
    layers = CausalLMLayers(base, dtype=torch.float32, adapter=adapter, trust_remote_code=True)
    stages = build(layers, [0, 1, 4])
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for stage in stages for p in stage.parameters() if p.requires_grad):
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    (input_ids, _), _ = micro_batches()
    extra = [torch.ones_like(input_ids)] if isinstance(adapter, ControlAdapter) else []
    return layers, stages, run_stages([stage.eval() for stage in stages], input_ids, POSITIONS, *extra)


def test_a_lora_is_saved_merged_and_analysed(base: Path, tmp_path: Path) -> None:
    layers, stages, expected = train(base, LoRA(2))
    layers.adapter.rehearse_save(tmp_path / "adapter", layers.meta_model)
    assert not (tmp_path / "adapter").exists()
    layers.adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), layers.meta_model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), expected)
    with pytest.raises(ConfigurationError, match="trust_remote_code"):
        merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), trust_remote_code=True)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected)
    analyze(str(tmp_path / "adapter"), str(base), trust_remote_code=True)


def test_the_whole_model_is_saved_with_all_that_it_needs(base: Path, tmp_path: Path) -> None:
    layers, stages, expected = train(base, Full())
    for _ in range(2):  # the second replaces the first, although that holds code
        layers.adapter.rehearse_save(tmp_path / "saved", layers.meta_model)
        layers.adapter.save(tmp_path / "saved", map(layers.trained_state, stages), layers.meta_model)
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= FILES
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(load(tmp_path / "saved")), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert tokenizer("few words").input_ids == [1, 2]


def test_code_that_saving_would_delete_is_refused(base: Path, tmp_path: Path) -> None:
    layers, _, _ = train(base, Full())
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.py").write_text("")
    with pytest.raises(ConfigurationError, match=r"holds mine\.py"):
        layers.adapter.rehearse_save(tmp_path / "saved", layers.meta_model)
    assert (tmp_path / "saved" / "mine.py").exists()


def test_code_of_another_repository_stays_where_it_is(base: Path, tmp_path: Path) -> None:
    layers, stages, _ = train(base, Full())
    auto_map = {"AutoConfig": "somebody/own--own_model.OwnConfig"}
    change(base / "config.json", auto_map=auto_map)
    layers.adapter.save(tmp_path / "saved", map(layers.trained_state, stages), layers.meta_model)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == auto_map


def test_a_control_adapter_becomes_a_lora(base: Path, tmp_path: Path) -> None:
    layers, stages, _ = train(base, ControlAdapter(2))
    layers.adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), layers.meta_model)
    told = control_to_lora(str(base), str(tmp_path / "adapter"), str(tmp_path / "lora"), trust_remote_code=True)
    assert "Compared with the Control Adapter" in told
    PeftModel.from_pretrained(load(base), tmp_path / "lora")


def test_the_rehearsal_goes_as_far_as_the_act(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no place")

    for adapter, what in (
        (LoRA(2), (LoraConfig, "save_pretrained")),
        (Full(), (Path, "write_text")),
        (Full(), (full, "revert_weight_conversion")),
    ):
        module = PipeLiteModule(str(base), adapter, trust_remote_code=True)
        module.check_save(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(*what, broken)
            with pytest.raises(ConfigurationError, match="cannot be written"):
                module.check_save(tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [SafetensorError("No space left"), ConfigurationError("another"), TypeError("x")])
def test_whatever_hinders_saving_is_one_error_on_all_ranks(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    class Strategy:
        is_global_zero = True
        topology = Topology(world_size=1, stages=1)

        def collect_stages(self, state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            for number in range(3):
                yield state
                taken.append(number)

        def broadcast(self, said: Any) -> Any:
            return said

    def broken(*_: Any, **__: Any) -> None:
        raise error

    module = PipeLiteModule(str(write_model(tmp_path / "base", "llama")), LoRA(2), dtype="float32")
    module.pipeline_stage = module.pipeline_layers()[0].build_stage(0, 4, torch.device("cpu"))
    monkeypatch.setattr(PipeLiteModule, "check_strategy", lambda *_: Strategy())
    monkeypatch.setattr(PipeLiteModule, "trainer", SimpleNamespace(strategy=None, datamodule=None))
    monkeypatch.setattr(lora, "save_file", broken)
    with pytest.raises(OSError, match=f"out cannot be written: {error}"):
        module.save_trained(tmp_path / "out")
    assert taken == [0, 1, 2]  # no stage is left waiting
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["by the checkpoint", "by the configuration"])
@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"allow_pickled_weights": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ],
    ids=lambda options: list(options)[-1],
)
def test_convert_loads_the_base_as_the_training_did(
    tmp_path: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    (write_own if "trust_remote_code" in options else lambda path: write_model(path, "llama"))(base)
    if "allow_pickled_weights" in options:
        torch.save(AutoModelForCausalLM.from_pretrained(base).state_dict(), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    module = PipeLiteModule(str(base), LoRA(2), dtype="float32", **options)
    layers, _ = module.pipeline_layers()
    stage = build(layers, [0, 4])[0]
    values = {name: torch.randn(p.shape) for name, p in stage.named_parameters() if p.requires_grad}
    meta = {"identity": module.checkpoint_identity(), "hyper_parameters": dict(module.hparams), "step": 3}

    def checkpoint(_: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
        return meta, iter(values.items())

    loaded: dict[str, Any] = {}

    class Spy(CausalLMLayers):
        def __init__(self, *args: Any, **given: Any) -> None:
            loaded.update(given)
            super().__init__(*args, **given)

    monkeypatch.setattr(own_checkpoint, "read_checkpoint", checkpoint)
    monkeypatch.setattr(own_checkpoint, "CausalLMLayers", Spy)
    config = None
    if said == "by the configuration":
        config = str(tmp_path / "config.yaml")
        adapter = {"class_path": "lightning_pipelite.adapters.LoRA", "init_args": {"rank": 2}}
        model = {"model_dir": str(base), "adapter": adapter, "dtype": "float32", **options}
        Path(config).write_text(json.dumps({"model": model}))
    (tmp_path / "checkpoint").mkdir()
    convert(str(tmp_path / "checkpoint"), str(tmp_path / "out"), config)
    assert options.items() <= loaded.items()
    PeftModel.from_pretrained(load(base), tmp_path / "out")
    change(base / "config.json", rms_norm_eps=0.1)  # another base in its place
    with pytest.raises(ConfigurationError, match=r"trained on another base .*allow_another_base"):
        convert(str(tmp_path / "checkpoint"), str(tmp_path / "other"), config)
    convert(str(tmp_path / "checkpoint"), str(tmp_path / "other"), config, allow_another_base=True)


def test_a_checkpoint_says_what_of_its_base_may_differ(tmp_path: Path) -> None:
    base = write_model(tmp_path, "llama")
    for options, identity, allowed in (
        ({}, set(), False),
        ({"allow_another_base": True}, set(), True),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"bnb_4bit_use_double_quant"}, False),
        ({"load_in_fp8": True, "fp8_transpose_cache": True}, {"load_in_fp8"}, False),
    ):
        module = PipeLiteModule(str(base), LoRA(2), **options)  # type: ignore[arg-type]
        assert module.checkpoint_identity().keys() == {"base_model", "adapter", "dtype", "load_in_4bit"} | identity
        assert module.checkpoint_may_differ == {"base_model": (allowed, "model.allow_another_base")}


def test_a_model_with_code_of_its_own_can_be_checked(base: Path) -> None:
    assert not check_model(base, (1, 2), tiny=True, trust_remote_code=True).differences
