"""The ``pipelite`` command as its user sees it; tests/errors covers its error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_pipelite import __version__
from lightning_pipelite.cli import main as cli
from lightning_pipelite.shared.verbosity import is_verbose, take_option
from tiny_job import options, write_job
from wrong_input import edited, strategy


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore the environment variables, some of which the command sets for the processes that it starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def pipelite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Run the command in this process, in an empty directory; return what it did."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, *args, **kwargs: started.append(command))

    def run(*arguments: str) -> SimpleNamespace:
        before = {path.name for path in here.iterdir()}
        monkeypatch.setattr(sys, "argv", ["pipelite", *arguments])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        left = {path.name for path in here.iterdir()} - before
        return SimpleNamespace(code=code, out=out, err=err, started=started, left=left)

    return run


# In this process


def test_help_and_version(pipelite: Callable[..., SimpleNamespace]) -> None:
    assert pipelite("--version").out == f"pipelite {__version__}\n"
    top = pipelite("--help")
    assert top.code == 0
    assert top.err == ""
    assert "fit" in top.out
    assert "validate" in top.out
    assert pipelite("fit", "--help").out.startswith("usage: pipelite fit --config FILE")
    fit = pipelite("fit", "--help-all")
    assert fit.code == 0
    for option in ("--model.activation_memory", "--trainer.max_steps", "--data.eval_fraction", "--ckpt_path"):
        assert option in fit.out
    assert "PIPELITE_FIT__TRAINER__MAX_STEPS" in fit.out
    assert "he learning rate, approached by" in " ".join(fit.out.split())  # from a docstring


def test_printed_configuration_can_be_used_again(pipelite: Callable[..., SimpleNamespace], job: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(options(job)))
    os.environ["PIPELITE_FIT__TRAINER__MAX_EPOCHS"] = "7"
    first = pipelite("fit", "--config", "config.yaml", "--model.lr", "0.5", "--print_config")
    assert first.code == 0
    assert first.err == ""
    printed = yaml.safe_load(first.out)
    assert printed["model"]["lr"] == 0.5  # the command line
    assert printed["trainer"]["max_epochs"] == 7  # the environment
    assert printed["trainer"]["max_steps"] == 1  # the file
    assert printed["trainer"]["strategy"]["init_args"]["pipeline_stages"] == 1  # a default
    Path("again.yaml").write_text(first.out)
    del os.environ["PIPELITE_FIT__TRAINER__MAX_EPOCHS"]
    assert pipelite("fit", "--config", "again.yaml", "--print_config").out == first.out


def test_classes_have_short_names(pipelite: Callable[..., SimpleNamespace], job: Path) -> None:
    config = edited(options(job), {"model.adapter": {"class_path": "Full"}})
    Path("config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--trainer.strategy.pipeline_stages", "2", "--trainer.callbacks+=EvalSchedule"]
    printed = yaml.safe_load(pipelite("fit", "--config", "config.yaml", *arguments, "--print_config").out)
    assert printed["model"]["adapter"]["class_path"] == "lightning_pipelite.adapters.Full"
    assert printed["trainer"]["strategy"]["init_args"]["pipeline_stages"] == 2
    assert printed["trainer"]["callbacks"][0]["class_path"] == "lightning_pipelite.callbacks.EvalSchedule"


def test_saved_configuration_replaces_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import SaveConfigCallback

    from lightning_pipelite.cli.saved_config import SaveConfig

    saved: list[str] = []
    monkeypatch.setattr(SaveConfigCallback, "setup", lambda self, *args: saved.append(self.config_filename))
    (tmp_path / "config.yaml").write_text("mine")

    def setup(logger: object) -> None:
        trainer: Any = SimpleNamespace(logger=logger, log_dir=str(tmp_path), is_global_zero=True)
        SaveConfig(None, None).setup(trainer, None, "fit")  # type: ignore[arg-type]

    setup(logger=None)
    assert saved == []
    setup(logger=object())
    (tmp_path / "config-2.yaml").touch()
    setup(logger=object())
    assert saved == ["config-2.yaml", "config-3.yaml"]


# In processes of its own

COUNTS_STARTS = """
import os
if os.environ.get("LOCAL_RANK") or not os.path.exists(os.environ["STARTS"]):
    with open(os.environ["STARTS"], "a") as file:
        file.write(os.environ.get("LOCAL_RANK", "first") + "\\n")
else:
    with open(os.environ["STARTS"], "a") as file:
        file.write("further\\n")
"""


def processes(here: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the command in a process of its own; also return which Python processes were started."""
    (here / "site").mkdir(exist_ok=True)
    (here / "site" / "sitecustomize.py").write_text(COUNTS_STARTS)
    starts = here / "starts"
    starts.unlink(missing_ok=True)
    paths = [str(here / "site"), str(Path(cli.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "lightning_pipelite", *arguments],
        cwd=here,
        env={**variables, "PYTHONPATH": os.pathsep.join(paths), "STARTS": str(starts), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return result, starts.read_text().split()


@pytest.mark.slow
def test_refusal_for_two_devices_starts_no_process(tmp_path: Path, job: Path) -> None:
    config = edited(options(job, devices=2, logger=True, enable_checkpointing=True), strategy(pipeline_stages=2))
    config = edited(config, {"trainer.strategy.init_args.partition_method": "type:Mamba"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result, starts = processes(tmp_path, "fit", "--config", "config.yaml")
    assert result.stderr == (
        "pipelite: error: partition_method: 'Mamba' matches none of the layer types LlamaDecoderLayer.\n"
    )
    assert result.stdout == ""
    assert result.returncode == 2
    assert starts == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "site", "starts"}


@pytest.mark.slow
def test_two_devices_train_and_print_only_what_matters(tmp_path: Path, job: Path) -> None:
    config = edited(
        options(job, devices=2, accumulate_grad_batches=2, enable_progress_bar=True),
        strategy(pipeline_stages=2, partition_method="auto"),
    )
    config["trainer"]["callbacks"] = [
        {"class_path": "EvalSchedule", "init_args": {"evals_per_epoch": 1}},
        {"class_path": "lightning_pipelite.callbacks.SaveTrained", "init_args": {"output_dir": "deep/down/lora"}},
    ]
    config["model"]["load_in_4bit"] = True
    del config["trainer"]["max_steps"]
    written = yaml.safe_dump(config)
    (tmp_path / "config.yaml").write_text(written)
    result, starts = processes(tmp_path, "fit", "--config", "config.yaml", PIPELITE_FIT__TRAINER__MAX_STEPS="2")
    assert result.returncode == 0, result.stderr
    assert starts == ["first", "1"]
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [f"{job}/texts/*.txt:", "text:"],
        ["train:", "19"], ["eval:", "1"], ["dataset", f"{job}/texts/*.txt:"], ["packed", "data:"], ["step", "0:"],
        ["step", "2:"], ["saved", "the"], ["next:"], ["pipelite", "generate"], ["pipelite", "merge"],
        ["pipelite", "export-gguf"],
    ]  # fmt: skip
    assert lines[-5] == "saved the trained weights to deep/down/lora"
    assert f"--model_dir {job}/model --adapter deep/down/lora --output deep/down/lora-merged" in lines[-2]
    progress = [line.split(",")[0] for line in result.stderr.splitlines() if line.startswith("training")]
    assert progress[:1] == ["training (50 %): step 1/2"], result.stderr
    assert {*progress} == {"training (50 %): step 1/2", "training (100 %): step 2/2"}, result.stderr  # from rank 0 only
    assert (tmp_path / "config.yaml").read_text() == written  # without a logger, no configuration is saved over it
    adapter = json.loads((tmp_path / "deep" / "down" / "lora" / "adapter_config.json").read_text())
    assert adapter["r"] == 2


@pytest.mark.slow
def test_verbose_prints_what_the_libraries_say(tmp_path: Path, job: Path) -> None:
    """The libraries have printed their messages by the time that the configuration is refused."""
    config = edited(options(job), {"trainer.devices": 5, **strategy(pipeline_stages=5)})  # the model has four layers
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result, _ = processes(tmp_path, "fit", "--verbose", "--config", "config.yaml")
    assert result.returncode == 2, result.stderr
    said = result.stdout + result.stderr
    assert "Seed set to 0" in said  # Lightning
    assert "GPU available: " in said


@pytest.mark.parametrize("position", [1, 2, 3])
def test_verbose_may_stand_anywhere(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["pipelite", "fit", "--config"]
    monkeypatch.setattr(sys, "argv", [*arguments[:position], "--verbose", *arguments[position:]])
    assert not is_verbose()
    take_option()
    assert sys.argv == arguments
    assert is_verbose()  # by the environment, which child processes inherit
