"""Each wrong input gives a one-line error and exit status 2; no file changes, and no process is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wrong_commands
import wrong_data
import wrong_first_tries
import wrong_models
import wrong_options
import wrong_runs
import yaml
from fork_server import ForkServer

from tiny_job import options, write_job
from wrong_input import Case, adapter, edited

pytestmark = pytest.mark.process

TABLES = [
    table.CASES for table in (wrong_options, wrong_models, wrong_data, wrong_runs, wrong_commands, wrong_first_tries)
]
CASES: dict[str, Case] = {name: case for table in TABLES for name, case in table.items()}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def server(job: Path) -> Iterator[ForkServer]:
    server = ForkServer(job / "model")
    _train(server, job, "adapter", {})
    _train(server, job, "control", adapter("ControlAdapter", rank=2))
    yield server
    server.close()


def _train(server: ForkServer, job: Path, name: str, edit: dict[str, object]) -> None:
    """Train one step, which leaves ``NAME`` and ``NAME-checkpoint`` in the job, and fills its cache."""
    config = edited(options(job, enable_checkpointing=True, limit_val_batches=1), edit)
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning_pipelite.callbacks.SaveTrained", "init_args": {"output_dir": name}},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": ".", "filename": f"{name}-checkpoint"}},
    ]
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    ended = server.run(job, "fit", "--config", "config.yaml")
    assert ended.code == 0, ended.err
    (job / f"{name}-checkpoint.ckpt").rename(job / f"{name}-checkpoint")


def test_the_table_is_as_large_as_promised() -> None:
    assert len(CASES) == sum(map(len, TABLES)) >= 60


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name: str, server: ForkServer, job: Path, tmp_path: Path) -> None:
    case, here = CASES[name], tmp_path / "here"
    here.mkdir()
    weights = (job / "model" / "model.safetensors").stat().st_size
    places = {"job": job, "here": here, "size": weights - 100, "whole": weights, "sequences": "SEQUENCES"}

    def filled(text: str) -> str:
        for place, value in places.items():
            text = text.replace("{" + place + "}", str(value))
        return text

    config = yaml.safe_dump(edited(options(job), case.edit))
    (here / "config.yaml").write_text(filled(config))
    case.prepare(here, job)
    before = {path: path.read_bytes() for folder in (here, job) for path in folder.rglob("*") if path.is_file()}

    ended = server.run(here, *map(filled, [*case.command, *case.arguments]), **case.environment)

    said = filled(case.says)
    for number in [word for word in ended.err.split() if word.isdigit()] if "SEQUENCES" in said else []:
        said = said.replace("SEQUENCES", number)
    if case.says.endswith((".", "?")) or "..." in case.says:
        assert ended.err == f"pipelite: error: {said}\n"
    else:
        assert ended.err.startswith(f"pipelite: error: {said}")
        assert ended.err.endswith("\n")
        assert ended.err.count("\n") == 1
    assert ended.code == 2
    assert ended.left == []
    assert case.starts or ended.started == []
    after = {path for path in here.rglob("*") if path.is_file()}
    assert after == {path for path in before if here in path.parents}
    assert {path: path.read_bytes() for path in before} == before
