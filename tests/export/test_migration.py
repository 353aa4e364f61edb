"""Configurations of qlora-pipe-lite: every key, changed meanings, and whether the command line accepts the result."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from export_cases import write_base
from lightning_pipelite.cli import main as cli
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import migrate

COMMON = """
model_dir = '{model}'
output_dir = '{folder}/output'
lr = 2e-5
epochs = 1
beta1 = 0.9
beta2 = 0.99
eps = 1e-6
sequence_len = 64
pipeline_stages = 1
gradient_accumulation_steps = 8
eval_gradient_accumulation_steps = 1
eval_fraction = 0.01
evals_per_epoch = 10
checkpoint_interval_hours = 1
max_checkpoints = 3
{more}
[[datasets]]
dataset_path = '{folder}/texts/*.txt'
max_tokens = 10000000
{dataset}
"""
LORA = """
lora_rank = 16
lora_dropout = 0.1
lora_weight_dtype = "float32"
lora_weight_decay = 10.0
"""
EXAMPLES = {
    "full": ("full_fine_tune = true", ""),
    "lora": (LORA, ""),
    "qlora": (LORA + "load_in_4bit = true", ""),
    "control": (LORA + "use_control_adapters = true\nload_in_4bit = true", "control_class = -1"),
}


def _write(tmp_path: Path, more: str = LORA, dataset: str = "", model: str = "models/base") -> Path:
    path = tmp_path / "config.toml"
    path.write_text(COMMON.format(folder=tmp_path, model=model, more=more, dataset=dataset))
    return path


def _migrated(path: Path) -> dict[str, Any]:
    text = migrate(str(path))
    assert text is not None
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _callbacks(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        each["class_path"].rpartition(".")[2]: each.get("init_args", {}) for each in content["trainer"]["callbacks"]
    }


def _missing(content: Any) -> list[str]:
    """Return the classes in the content that this version does not have."""
    if isinstance(content, list):
        return [name for each in content for name in _missing(each)]
    if not isinstance(content, dict):
        return []
    missing = [name for each in content.values() for name in _missing(each)]
    if "class_path" in content:
        module, _, name = content["class_path"].rpartition(".")
        if not hasattr(importlib.import_module(module), name):
            missing.append(content["class_path"])
    return missing


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_examples_are_accepted_by_the_command_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, dataset = EXAMPLES[kind]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_text("text")
    path = _write(tmp_path, more, dataset, str(write_base(tmp_path / "model", "llama")))
    output = tmp_path / "config.yaml"
    assert "pipelite fit --config" in str(migrate(str(path), str(output)))
    content = yaml.safe_load(output.read_text())
    assert _missing(content) == []
    monkeypatch.setattr(sys, "argv", ["pipelite", "fit", "--config", str(output), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    # If DeepSpeed is first imported here, it prints which accelerator it found.
    lines = [line for line in capsys.readouterr().out.splitlines() if "real_accelerator" not in line]
    printed = yaml.safe_load("\n".join(lines))
    for part in ("model", "data"):
        for key, value in content[part].items():
            if key not in ("adapter", "datasets"):
                assert printed[part][key] == value


def test_every_key_arrives(tmp_path: Path) -> None:
    more = LORA + (
        "partition_method = 'parameters'\nuse_column_major_topology = true\ntarget_modules = ['q_proj']\n"
        "layers_to_transform = '0:3, 7'\nmax_sequences = 100\ndrop_tails = true\nmix_datasets = true\n"
        "sequence_prefix = [1, 2]\ndocument_prefix = '<a>'\ndocument_suffix = ''\nmask_tokens = true\n"
    )
    content = _migrated(_write(tmp_path, more))
    trainer, model, data = content["trainer"], content["model"], content["data"]
    assert trainer["strategy"]["init_args"] == {
        "pipeline_stages": 1,
        "partition_method": "parameters",
        "use_column_major_topology": True,
    }
    assert (trainer["max_epochs"], trainer["accumulate_grad_batches"]) == (1, 8)
    callbacks = _callbacks(content)
    assert callbacks["CompositeWeightDecay"] == {"weight_decay": 10.0}
    assert callbacks["AdapterNorms"] == {}
    assert callbacks["EvalSchedule"] == {"evals_per_epoch": 10}
    assert callbacks["TimedCheckpoint"]["checkpoint_interval_hours"] == 1
    assert callbacks["TimedCheckpoint"]["max_checkpoints"] == 3
    assert callbacks["SaveTrained"] == {"output_dir": f"{tmp_path}/output/trained"}
    assert model == {
        "model_dir": "models/base",
        "adapter": {
            "class_path": "lightning_pipelite.adapters.LoRA",
            "init_args": {
                "rank": 16,
                "dropout": 0.1,
                "dtype": "float32",
                "layers_to_transform": "0:3, 7",
                "target_modules": ["q_proj"],
            },
        },
        "lr": 2e-5,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-6,
    }
    assert data == {
        "datasets": [{"dataset_path": f"{tmp_path}/texts/*.txt", "max_tokens": 10000000}],
        "sequence_len": 64,
        "max_sequences": 100,
        "drop_tails": True,
        "mix_datasets": True,
        "sequence_prefix": [1, 2],
        "document_prefix": "<a>",
        "document_suffix": "",
        "mask_tokens": True,
        "eval_fraction": 0.01,
        "eval_gradient_accumulation_steps": 1,
    }


def test_defaults_are_those_of_qlora_pipe_lite(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        "model_dir = 'm'\noutput_dir = 'o'\nlr = 1e-4\nsequence_len = 64\nlora_rank = 4\n"
        "gradient_accumulation_steps = 6\nuse_control_adapters = true\n[[datasets]]\ndataset_path = 'a.json'\n"
    )
    content = _migrated(path)
    assert content["data"]["eval_gradient_accumulation_steps"] == 6  # by default, qlora-pipe-lite uses the training's
    assert content["model"]["adapter"]["init_args"] == {"rank": 4, "dropout": 0.0, "dtype": "float32", "gamma": 0.5}
    assert _callbacks(content)["CompositeWeightDecay"] == {"weight_decay": 0.0}  # keeps Q orthogonal


CHANGED = {
    "lora_alpha": ("lora_alpha = 4", "# lora_alpha was 4: B·A is no longer scaled by 0.25"),
    "evals_per_run": ("evals_per_run = 11", "# Was evals_per_run = 11"),
    "partition": ("partition_method = 'type:decoderlayerpipe'", "# Was 'type:decoderlayerpipe'"),
    "sigma": ("control_adapter_sigma = 2.0", "# control_adapter_sigma is left out"),
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_comment_says_where_a_meaning_changed(key: str, tmp_path: Path) -> None:
    more, says = CHANGED[key]
    path = _write(tmp_path, LORA + more)
    if key == "evals_per_run":
        path.write_text(path.read_text().replace("evals_per_epoch = 10\n", "").replace("epochs = 1", "epochs = 2"))
    text = migrate(str(path))
    assert text is not None
    assert says in text
    if key == "evals_per_run":
        assert _callbacks(yaml.safe_load(text))["EvalSchedule"] == {"evals_per_epoch": 5}
    if key == "partition":
        assert yaml.safe_load(text)["trainer"]["strategy"]["init_args"]["partition_method"] == "uniform"


def test_options_of_single_datasets(tmp_path: Path) -> None:
    content = _migrated(_write(tmp_path, dataset="drop_tails = true\ndocument_suffix = '<e>'"))
    assert (content["data"]["drop_tails"], content["data"]["document_suffix"]) == (True, "<e>")
    path = _write(tmp_path, dataset="max_sequences = 10")
    path.write_text(path.read_text().replace("max_tokens = 10000000\n", ""))
    assert _migrated(path)["data"]["datasets"][0]["max_tokens"] == 640


REFUSED = {
    "unknown": ("lora_rnak = 3", "has the key lora_rnak, which qlora-pipe-lite does not have; correct or remove it"),
    "both": ("full_fine_tune = true\nuse_control_adapters = true", "choose one"),
    "kind": ("drop_tails = true\nlayers_to_transform = true", "layers_to_transform is True; set it to a value of type"),
    "decay": ("lora_weight_decay_type = 'nuclear'", "lora_weight_decay_type has no counterpart"),
    "norm": ("lora_max_norm = 1.0", "lora_max_norm has no counterpart"),
    "symmetrise": ("control_adapter_type = 'symmetrise'", "control_adapter_type has no counterpart"),
    "class0": ("control_class0_lambda = 1.0", "control_class0_lambda has no counterpart"),
    "partition": ("partition_method = 'type:embedding'", "balances layers other than decoder layers"),
    "targets": ("use_control_adapters = true\ntarget_modules = ['q']", "use_control_adapters takes no target_modules"),
    "full decay": ("full_fine_tune = true", "lora_weight_decay is for adapters only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_over_is_an_error(case: str, tmp_path: Path) -> None:
    more, says = REFUSED[case]
    with pytest.raises(ConfigurationError, match=says):
        migrate(str(_write(tmp_path, LORA + more)))


@pytest.mark.parametrize(
    "line",
    [
        "lora_weight_decay_type = 'l2'",
        "lora_max_norm = 0.0",
        "control_adapter_type = 'full'",
        "control_class0_lambda = 0.0",
    ],
)
def test_values_without_effect_are_left_out(line: str, tmp_path: Path) -> None:
    assert migrate(str(_write(tmp_path, LORA + line))) == migrate(str(_write(tmp_path)))


def test_files_that_are_none_or_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(ConfigurationError, match="cannot be read as TOML"):
        migrate(str(path))
    path.write_text("lr = [")
    with pytest.raises(ConfigurationError, match="cannot be read as TOML"):
        migrate(str(path))
    path.write_text("lr = 1e-5")
    with pytest.raises(ConfigurationError, match="has no output_dir; add it"):
        migrate(str(path))
    with pytest.raises(ConfigurationError, match="exists; choose a new file"):
        migrate(str(path), str(path))
