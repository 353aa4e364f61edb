"""From training to use: adapters trained by `pipelite fit` are merged, converted and used to generate text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quickstart
from command_jobs import run_command
from lightning_pipelite.export import control_to_lora, convert, export_gguf, merge
from processes import Workers
from tiny_job import options, write_job

CALLBACKS = "lightning_pipelite.callbacks"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a job with the quickstart's base model."""
    made = write_job(tmp_path_factory.mktemp("job"))
    shutil.rmtree(made / "model")
    quickstart.write_texts(made / "quickstart")
    quickstart.make_base_model(made / "quickstart").rename(made / "model")
    return made


def _train(
    workers: Workers, job: Path, folder: Path, adapter: str, init_args: dict[str, Any], *callbacks: dict[str, Any]
) -> Path:
    """Train two steps and save the result in ``trained``; return the path of the configuration."""
    saves = any("TimedCheckpoint" in each["class_path"] for each in callbacks)
    config = options(job, max_steps=2, enable_checkpointing=saves)
    save = {"class_path": f"{CALLBACKS}.SaveTrained", "init_args": {"output_dir": str(folder / "trained")}}
    config["trainer"]["callbacks"] = [*callbacks, save]
    config["model"]["adapter"] = {"class_path": f"lightning_pipelite.adapters.{adapter}", "init_args": init_args}
    config["model"]["lr"] = 0.02
    if adapter == "ControlAdapter":
        config["data"]["datasets"][0]["control_class"] = 1
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    workers.run(1, run_command, str(folder), ["fit", "--config", str(path)])
    return path


def _generate(directory: Path, adapter: Path | None = None) -> tuple[str, torch.Tensor]:
    """Return what a model, with an adapter beside it if one is given, writes after a prompt, and the logits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    written = model.generate(**tokenizer("The object", return_tensors="pt"), max_new_tokens=5, **options)
    return str(tokenizer.decode(written.sequences[0, -5:])), torch.cat(written.logits)


def _check_writes_as(merged: Path, base: Path, adapter: Path) -> None:
    """Check that the merged model writes what the base writes with the adapter beside it, and not as the base alone."""
    (found, logits), (wanted, expected), (_, before) = _generate(merged), _generate(base, adapter), _generate(base)
    assert found == wanted
    assert len(logits) == 5
    assert (logits - expected).abs().max() < 0.05 * (logits - before).abs().max()


@pytest.mark.slow
def test_lora_to_merged_model_and_to_gguf(workers: Workers, job: Path, tmp_path: Path) -> None:
    _train(workers, job, tmp_path, "LoRA", {"rank": 2})
    base, trained = job / "model", tmp_path / "trained"
    merge(str(base), str(trained), str(tmp_path / "merged"))
    ids = torch.tensor([[3, 14, 15, 92]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        before = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-3)
    _check_writes_as(tmp_path / "merged", base, trained)
    export_gguf(str(trained), str(base), str(tmp_path / "lora.gguf"))
    names = {each.name for each in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(names) == len(load_file(trained / "adapter_model.safetensors"))


@pytest.mark.slow
def test_control_adapter_to_lora_to_merged_model(workers: Workers, job: Path, tmp_path: Path) -> None:
    decay = {"class_path": f"{CALLBACKS}.CompositeWeightDecay", "init_args": {"weight_decay": 0.0}}
    _train(workers, job, tmp_path, "ControlAdapter", {"rank": 2}, decay)
    base, trained = job / "model", tmp_path / "trained"
    told = control_to_lora(str(base), str(trained), str(tmp_path / "lora"))
    assert "KL divergence" in told
    merge(str(base), str(tmp_path / "lora"), str(tmp_path / "merged"))
    before, after = (load_file(each / "model.safetensors") for each in (base, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"model.layers.{number}.mlp.down_proj.weight" for number in range(4)} <= changed
    _check_writes_as(tmp_path / "merged", base, tmp_path / "lora")
    export_gguf(str(trained), str(base), str(tmp_path / "control.gguf"))
    names = {each.name for each in gguf.GGUFReader(tmp_path / "control.gguf").tensors}
    assert len(names) == len(load_file(tmp_path / "lora" / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["LoRA", "Full", "ControlAdapter"])
def test_a_checkpoint_is_converted_to_what_the_training_saved(
    adapter: str, workers: Workers, job: Path, tmp_path: Path
) -> None:
    timed = {"class_path": f"{CALLBACKS}.TimedCheckpoint", "init_args": {"dirpath": str(tmp_path / "checkpoints")}}
    decay = {"class_path": f"{CALLBACKS}.CompositeWeightDecay", "init_args": {"weight_decay": 0.0}}
    extra = [decay] if adapter == "ControlAdapter" else []
    config = _train(workers, job, tmp_path, adapter, {} if adapter == "Full" else {"rank": 2}, timed, *extra)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    convert(str(checkpoint), str(tmp_path / "converted"), str(config))
    wanted, found = (
        {name: tensor for path in sorted(each.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for each in (tmp_path / "trained", tmp_path / "converted")
    )
    assert wanted.keys() == found.keys()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    convert(str(checkpoint), str(tmp_path / "again"))  # with the configuration that the checkpoint records
    for path in (tmp_path / "converted").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert list((tmp_path / "converted").glob("*.safetensors"))
