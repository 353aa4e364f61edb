"""fit, plan, preview and convert read a configuration alike: files, options, environment variables and links."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipelite.cli import plan_command, preview_command
from lightning_pipelite.cli.commands import COMMANDS, _split
from lightning_pipelite.cli.fit import TrainerCLI
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import conversion

COMMANDS_OF_A_CONFIGURATION = ["fit", "plan", "preview", "convert"]
FIRST = {
    "trainer": {"accumulate_grad_batches": 2, "strategy": {"class_path": "lightning_pipelite.PipeLiteStrategy"}},
    "model": {"model_dir": "first", "adapter": {"class_path": "LoRA", "init_args": {"rank": 2}}},
    "data": {"datasets": [{"dataset_path": "a.txt"}], "sequence_len": 64},
}
SECOND = {"model": {"model_dir": "second"}, "data": {"sequence_len": 128}}


class Stop(Exception):  # noqa: N818 - nothing is wrong
    """Raised once the command has read its configuration."""


@pytest.fixture
def read(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run a command until it has read its configuration files, two by default; return the settings that it read."""
    for name, content in (("first.yaml", FIRST), ("second.yaml", SECOND)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    def fit(cli: Any) -> None:
        seen.update(cli.config.fit.as_dict())
        raise Stop

    def simulate(settings: Any, device: Any) -> None:
        seen.update(
            model=settings.model,
            data={"sequence_len": settings.sequence_len},
            trainer={"accumulate_grad_batches": settings.micro_batches},
        )
        raise Stop

    def preview(self: Any) -> None:
        seen.update(data={"sequence_len": self._options.sequence_len}, model={"model_dir": str(self._directory())})
        raise Stop

    def convert_own(checkpoint: Path, output: Path, config: Any, *, allow_another_base: bool) -> None:
        seen.update(config)
        raise Stop

    monkeypatch.setattr(TrainerCLI, "instantiate_classes", fit)
    monkeypatch.setattr(plan_command, "simulate", simulate)
    monkeypatch.setattr(preview_command.PackedDataModule, "train_dataloader", preview)
    monkeypatch.setattr(conversion, "convert_own", convert_own)

    def run(command: str, *words: str, files: tuple[str, ...] = ("first.yaml", "second.yaml")) -> dict[str, Any]:
        seen.clear()
        arguments = [word for file in files for word in ("--config", file)] + [*words]
        place = ["--checkpoint", str(tmp_path), "--output", "out"] if command == "convert" else []
        monkeypatch.setattr("sys.argv", ["pipelite", command, *place, *arguments])
        with pytest.raises(Stop):
            TrainerCLI() if command == "fit" else COMMANDS[command].run(command, sys.argv[2:])
        return seen

    return run


@pytest.mark.parametrize("command", COMMANDS_OF_A_CONFIGURATION)
def test_of_several_files_the_later_ones_hold(command: str, read: Callable[..., dict[str, Any]]) -> None:
    told = read(command)
    assert (told["model"]["model_dir"], told["data"]["sequence_len"]) == ("second", 128)
    if command != "preview":
        assert told["model"]["adapter"]["init_args"]["rank"] == 2
    told = read(command, files=("second.yaml", "first.yaml"))
    assert (told["model"]["model_dir"], told["data"]["sequence_len"]) == ("first", 64)


@pytest.mark.parametrize("command", COMMANDS_OF_A_CONFIGURATION)
def test_options_replace_what_files_say(command: str, read: Callable[..., dict[str, Any]]) -> None:
    told = read(command, "--model.model_dir=other", "--data.sequence_len", "192", "--trainer.accumulate_grad_batches=3")
    assert (told["model"]["model_dir"], told["data"]["sequence_len"]) == ("other", 192)
    if command in ("fit", "plan"):
        assert told["trainer"]["accumulate_grad_batches"] == 3


@pytest.mark.parametrize("command", COMMANDS_OF_A_CONFIGURATION)
def test_the_environment_replaces_defaults(
    command: str, read: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIPELITE_FIT__DATA__SEQUENCE_LEN", "256")
    monkeypatch.setenv("PIPELITE_FIT__MODEL__MODEL_DIR", "from_environment")
    (tmp_path / "bare.yaml").write_text(
        "model: {adapter: {class_path: LoRA, init_args: {rank: 2}}}\ndata: {datasets: [{dataset_path: a.txt}]}"
    )
    told = read(command, files=("bare.yaml",))
    assert (told["model"]["model_dir"], told["data"]["sequence_len"]) == ("from_environment", 256)
    assert read(command)["data"]["sequence_len"] == 128  # a file overrides the environment
    monkeypatch.setenv("PIPELITE_FIT__DATA__SEQUENCE_LENGTH", "256")
    with pytest.raises(ConfigurationError, match="PIPELITE_FIT__DATA__SEQUENCE_LENGTH is not an option; did you mean"):
        read(command)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.modle_dir", "x"], r"^--model.modle_dir is not an option; did you mean --model.model_dir\?$"),
        (["--config", "wrong.yaml"], r"^data.sequence_length is not an option; did you mean data.sequence_len\?$"),
        (["--trainer.max_steps", "many"], r"^trainer.max_steps must be an integer, not many.$"),
        (["--config", "linked.yaml"], r"^data.tokenizer_dir is always model.model_dir; leave it out.$"),
        (["--seed_everything", "-1"], "^seed_everything is -1; give an integer from 0 to"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS_OF_A_CONFIGURATION)
def test_what_fit_refuses_all_refuse(
    command: str, words: list[str], says: str, read: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text("data: {sequence_length: 3}")
    (tmp_path / "linked.yaml").write_text("data: {tokenizer_dir: elsewhere}")
    with pytest.raises(ConfigurationError, match=says):
        read(command, *words)


def test_an_option_of_the_command_itself_is_proposed_too(read: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigurationError, match=r"--memroy is not an option; did you mean --memory\?"):
        read("plan", "--memroy", "24GiB")
    with pytest.raises(ConfigurationError, match=r"--nonsense is not an option; pipelite plan --help lists"):
        read("plan", "--nonsense", "1")


def test_words_are_parted_with_their_values() -> None:
    words = ["--devices", "2", "--trainer.x", "-1", "--picture=a.png", "-c", "file", "--allow", "--config=b"]
    assert _split(words, ["config", "devices", "picture", "allow"]) == (
        ["--devices", "2", "--picture=a.png", "--allow"],
        ["--trainer.x", "-1", "-c", "file", "--config=b"],
    )


def test_a_configuration_must_be_given() -> None:
    for command in ("plan", "preview"):
        with pytest.raises(ConfigurationError, match="config must be given on the command line: --config FILE"):
            COMMANDS[command].run(command, [])
