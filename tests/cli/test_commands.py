"""Commands other than fit and validate: their options and their error messages."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from lightning_pipelite.cli import main as cli
from lightning_pipelite.cli.commands import COMMANDS, Command
from lightning_pipelite.errors import ConfigurationError
from tiny_models import write_model


def function(base: str, output: Path, scale: float = 1.0, inverse: bool = False) -> str:
    """Do nothing.

    Args:
        base: a directory.
        output: another.
        scale: a factor.
        inverse: the other way round.
    """
    return f"{base} {output} {scale} {inverse}"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--base", "a", "--output", "b"], "a b 1.0 False"),
        (["--inverse", "--base", "a", "--output", "b", "--scale", "2"], "a b 2.0 True"),
        (["--base", "a", "--output", "b", "--inverse"], "a b 1.0 True"),
        (["--inverse", "false", "--base", "a", "--output", "b"], "a b 1.0 False"),
    ],
)
def test_options_are_the_parameters(arguments: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    Command(__name__, "function", "Does nothing.").run("nothing", arguments)
    assert capsys.readouterr().out == f"{printed}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "base, output must be given"),
        (["--base", "a", "--output", "b", "--scael", "2"], "--scael is not an option; did you mean --scale?"),
        (["--base", "a", "--output", "b", "--scale", "x"], "scale must be a number, not x."),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says.replace("?", "[?]")):
        Command(__name__, "function", "Does nothing.").run("nothing", arguments)


def test_nobody_reads_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed pipe, as in ``pipelite plan ... | head -1``, ends the command without a traceback."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as stop:
            Command(__name__, "function", "Does nothing.").run("nothing", ["--base", "a", "--output", "b"])
    assert stop.value.code == 128 + signal.SIGPIPE


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name].run(name, ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert COMMANDS[name].summary in " ".join(out.split())
    listed = re.findall(r"^  (?:-c.*)?--(\w+)", out, re.MULTILINE)
    assert {*COMMANDS[name].options} <= {*listed}


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_model(tmp_path, "llama")
    monkeypatch.setattr(sys, "argv", ["pipelite", "check", str(directory), "--stages", "1,2"])
    cli.main()
    out = capsys.readouterr().out
    assert "2 stages: " in out
    assert "The split and the unsplit model agree" in out
    assert "Packed documents give the same logits as each document alone." in out
    monkeypatch.setattr(sys, "argv", ["pipelite", "check", str(directory), "--stages", "1,x"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "stages must be comma-separated integers, not '1,x'." in capsys.readouterr().err
