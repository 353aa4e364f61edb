"""What a run of `pipelite fit` writes to its logs."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_pipelite.cli.saved_config import hyper_parameters
from processes import Workers
from tiny_job import options, write_job


def fit(directory: str) -> None:
    from lightning_pipelite.cli.main import main

    os.chdir(directory)
    sys.argv = ["pipelite", "fit", "--config", "config.yaml"]
    main()


def test_logs_of_a_run(workers: Workers, tmp_path: Path) -> None:
    write_job(tmp_path)
    config = options(tmp_path, max_steps=2, log_every_n_steps=1, gradient_clip_val=1.0, limit_val_batches=1)
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning_pipelite.callbacks.AdapterNorms"},
        {"class_path": "lightning_pipelite.callbacks.EvalSchedule", "init_args": {"evals_per_epoch": 1}},
    ]
    config["trainer"]["logger"] = [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": ".", "name": "tb"}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": ".", "name": "csv"}},
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    workers.run(1, fit, str(tmp_path))
    _check_tensorboard(tmp_path / "tb" / "version_0")
    _check_csv(tmp_path / "csv" / "version_0")
    assert yaml.safe_load((tmp_path / "tb" / "version_0" / "config.yaml").read_text())["model"]["lr"] == 2e-5


def _check_tensorboard(directory: Path) -> None:
    events = EventAccumulator(str(directory)).Reload()
    tags = events.Tags()
    logged = {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "eval/loss", "eval/perplexity"}
    norms = {f"train/norms_{kind}" for kind in ("avg", "min", "max")}
    stages = {"stage_busy_s/0", "stage_waiting_s/0", "stage_memory_gib/0"}
    assert logged | norms | stages <= {*tags["scalars"]}
    assert "hp_metric" not in tags["scalars"]
    assert "train/mfu" not in tags["scalars"]  # a CPU's peak is unknown
    assert tags["histograms"] == ["train/norms_by_layer"]
    assert tags["images"] == ["train/norms_map"]
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.removeprefix("```yaml\n").removesuffix("```"))["data"]["sequence_len"] == 64
    assert len(events.Scalars("eval/loss")) == 2  # the table of hyper-parameters has not added a zero
    chosen: dict[str, Any] = {}
    for content in (events.summary_metadata["_hparams_/session_start_info"].plugin_data.content,):
        data = plugin_data_pb2.HParamsPluginData.FromString(content)
        for name, value in data.session_start_info.hparams.items():
            chosen[name] = getattr(value, value.WhichOneof("kind"))
    assert chosen["model.adapter"] == "LoRA"
    assert chosen["model.adapter.rank"] == 2
    assert chosen["model.lr"] == 2e-5
    assert chosen["trainer.gradient_clip_val"] == 1
    assert chosen["data.sequence_len"] == 64
    assert "data.drop_tails" not in chosen  # has its default value
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/loss", "train/loss"]


def _check_csv(directory: Path) -> None:
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["eval/loss"] for row in rows)
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2  # one for each step
    assert all(loss > 0 for loss in losses)
    assert {"train/norms_avg", "stage_busy_s/0", "train/tokens_per_s"} <= {*rows[0]}
    written = yaml.safe_load((directory / "hparams.yaml").read_text())
    assert written["model.adapter"] == "LoRA"
    assert written["model.adapter.rank"] == 2


def test_hyper_parameters_have_short_names() -> None:
    configuration = {
        "model": {"adapter": {"class_path": "a.b.LoRA", "init_args": {"rank": 2, "targets": ["q", "k"]}}, "lr": None},
        "trainer": {"callbacks": [{"class_path": "a.B"}], "devices": 1},
    }
    assert dict(hyper_parameters(configuration)) == {
        "model.adapter": "LoRA",
        "model.adapter.rank": 2,
        "model.adapter.targets.0": "q",
        "model.adapter.targets.1": "k",
        "trainer.devices": 1,
    }
