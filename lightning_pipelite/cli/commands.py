"""The commands of ``pipelite`` beside fit and validate: each is a function, whose signature gives the options."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lightning_pipelite.cli.error_messages import explain
from lightning_pipelite.errors import ConfigurationError


@dataclass(frozen=True)
class Command:
    """Where a command's function is; it is imported when the command is called.

    Args:
        module: that holds the function.
        function: whose docstring is the help; what it returns is printed, unless None.
        summary: a line for ``pipelite --help``.
        positional: the parameters without a default are arguments, not options.
    """

    module: str
    function: str
    summary: str
    positional: bool = False

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Call the function with what the command line says.

        Raises:
            ConfigurationError: an option is wrong, or the function refuses what it was given.
        """
        function = getattr(importlib.import_module(self.module), self.function)
        parser = ArgumentParser(prog=f"pipelite {name}", description=self.summary, exit_on_error=False)
        parser.add_function_arguments(function, as_positional=self.positional)
        try:
            options = parser.parse_args(_with_values(function, arguments))
        except ArgumentError as error:
            sentence = explain(str(error), {name: parser})
            raise ConfigurationError(sentence.replace(", in the configuration file or on", " on")) from None
        result = function(**parser.instantiate_classes(options).as_dict())
        if result is not None:
            print(result, flush=True)


def _with_values(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Let a switch stand alone: ``--tiny`` is ``--tiny=true``."""
    switches = {f"--{name}" for name, each in inspect.signature(function).parameters.items() if each.default is False}
    following = itertools.chain(arguments[1:], [""])
    return [
        f"{word}=true" if word in switches and then not in ("true", "false") else word
        for word, then in zip(arguments, following, strict=False)
    ]


COMMANDS = {
    "plan": Command(
        "lightning_pipelite.cli.plan_command", "plan", "Say what a training takes of each GPU, and what fits."
    ),
    "check": Command(
        "lightning_pipelite.cli.check_command", "check", "Hold a model in stages against the same model unsplit.", True
    ),
    "merge": Command("lightning_pipelite.export.merging", "merge", "Add LoRAs to the weights of their base model."),
    "convert": Command(
        "lightning_pipelite.export.conversion",
        "convert",
        "Write what a training checkpoint holds as an adapter or a model.",
    ),
    "control-to-lora": Command(
        "lightning_pipelite.export.control_lora", "control_to_lora", "Make a LoRA of a Control Adapter."
    ),
    "export-gguf": Command(
        "lightning_pipelite.export.gguf", "export_gguf", "Write an adapter as a GGUF file, for llama.cpp."
    ),
    "analyze": Command(
        "lightning_pipelite.export.analysis", "analyze", "Print and draw the figures of a LoRA or a Control Adapter."
    ),
    "migrate": Command(
        "lightning_pipelite.export.migration", "migrate", "Turn a configuration of qlora-pipe-lite into YAML.", True
    ),
    "preview": Command(
        "lightning_pipelite.cli.preview_command",
        "preview",
        "Show the first packed sequences of a configuration as text.",
    ),
}
