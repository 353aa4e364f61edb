"""The next steps that a training suggests: commands that exist, for the files that it wrote."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_pipelite.callbacks import SaveTrained, TimedCheckpoint
from lightning_pipelite.cli.base_name import with_own_names
from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.early import check_command
from lightning_pipelite.cli.next_steps import next_steps


def trainer(*callbacks: Any, loggers: Any = (), finished: bool = True, tries: bool = False) -> Any:
    state = SimpleNamespace(finished=finished)
    return SimpleNamespace(callbacks=callbacks, loggers=loggers, state=state, fast_dev_run=tries)


def write(path: Path, **content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(Path("my model/config.json"), model_type="llama")
    return tmp_path


def commands(told: list[str]) -> list[list[str]]:
    """Return the suggested commands, after checking that each accepts its options."""
    if not told:
        return []
    assert told[0] == "next:"
    words = [shlex.split(line, comments=True) for line in told[1:]]
    for program, *rest in words:
        if program == "pipelite":
            check_command(rest[0], COMMANDS[rest[0]], with_own_names(rest[0], rest[1:]))
    return words


BASE = ["--model_dir", "my model"]


@pytest.mark.parametrize("more", [{"use_dora": True}, {"trainable_token_indices": [5]}], ids=str)
def test_what_llama_cpp_does_not_take_beside_its_base(here: Path, more: dict[str, Any]) -> None:
    write(Path("out/adapter_config.json"), peft_type="LORA", **more)
    told = commands(next_steps(trainer(SaveTrained("out")), BASE, []))
    assert [words[1] for words in told] == ["generate", "merge"]


def test_a_lora(here: Path) -> None:
    write(Path("out/adapter_config.json"), peft_type="LORA")
    Path("out-merged").mkdir()
    logger = TensorBoardLogger("logs", "run")
    logger.experiment.add_scalar("x", 1)
    told = commands(next_steps(trainer(SaveTrained("out"), loggers=[logger]), BASE, ["--chat"]))
    adapter = ["--model_dir", "my model", "--adapter", "out"]
    assert told == [
        ["pipelite", "generate", *adapter, "--chat"],
        ["pipelite", "merge", *adapter, "--output", "out-merged-2"],
        ["pipelite", "export-gguf", *adapter, "--output", "out.gguf"],
        ["tensorboard", "--logdir", "logs/run"],
    ]


def test_the_template_of_the_training_goes_on(here: Path) -> None:
    write(Path("out/adapter_config.json"), peft_type="LORA")
    asks = ["--chat_template", "alpaca"]
    shown, merged, _ = commands(next_steps(trainer(SaveTrained("out")), BASE, asks))
    assert (shown[-2:], merged[-2:]) == (asks, asks)
    write(Path("model/config.json"), model_type="llama")  # a saved model has the template in its tokenizer
    assert commands(next_steps(trainer(SaveTrained("model")), BASE, asks))[0][-1] == "--chat"


@pytest.mark.parametrize("kind", ["llama", "another"])
def test_a_control_adapter(kind: str) -> None:
    write(Path("my model/config.json"), model_type=kind)
    write(Path("out/adapter_config.json"), peft_type="CONTROL_ADAPTER")
    told = [words[1] for words in commands(next_steps(trainer(SaveTrained("out")), BASE, []))]
    assert told == ["control-to-lora", "export-gguf"][: 1 + (kind == "llama")]


def test_a_model() -> None:
    write(Path("out/config.json"), model_type="llama")
    told = commands(next_steps(trainer(SaveTrained("out")), [*BASE, "--trust_remote_code"], []))
    assert told == [["pipelite", "generate", "--model_dir", "out", "--trust_remote_code"]]


def test_checkpoints_alone() -> None:
    callback = TimedCheckpoint(dirpath="checkpoints")
    assert commands(next_steps(trainer(callback), BASE, [])) == []
    callback.last_model_path = "checkpoints/step=4.ckpt"
    told = commands(next_steps(trainer(callback), BASE, []))
    wanted = ["--checkpoint", "checkpoints/step=4.ckpt", "--output", "checkpoints/trained"]
    assert told == [["pipelite", "convert", *wanted]]


def test_nothing_where_nothing_was_written() -> None:
    assert next_steps(trainer(SaveTrained("out"), loggers=[TensorBoardLogger("logs")]), BASE, []) == []
    write(Path("out/adapter_config.json"), peft_type="LORA")
    assert next_steps(trainer(SaveTrained("out"), finished=False), BASE, []) == []
    assert next_steps(trainer(SaveTrained("out"), tries=True), BASE, []) == []
