"""The ``pipelite`` commands other than fit and validate: each is a function whose signature defines its options."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.cli.error_messages import explain
from lightning_pipelite.cli.option_names import parameters_of
from lightning_pipelite.errors import ConfigurationError


@dataclass(frozen=True)
class Command:
    """Where to find a command's function, which is imported only when the command runs.

    Args:
        module: Module of the function.
        function: Name of the function. Its docstring is the help; its result is printed unless it is None.
        summary: One line for ``pipelite --help``.
        positional: Whether parameters without a default are positional arguments rather than options.
    """

    module: str
    function: str
    summary: str
    positional: bool = False

    @property
    def reads_configuration(self) -> bool:
        """Whether it has an option ``config``, and so takes all options of ``pipelite fit`` besides its own."""
        return "config" in self.options

    @property
    def options(self) -> list[str]:
        """The names of its own options, found without importing its module."""
        parameters = parameters_of(self.module, self.function)
        return [name for name, is_required in parameters.items() if not (self.positional and is_required)]

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Call the function with the options on the command line.

        A command that reads a configuration receives it, together with all options that are not its own, as a
        :class:`~lightning_pipelite.cli.configuration.Configuration`.

        Raises:
            ConfigurationError: An option is wrong, or the function refuses its arguments.
        """
        function = getattr(importlib.import_module(self.module), self.function)
        parser = ArgumentParser(prog=f"pipelite {name}", description=self.summary, exit_on_error=False)
        own: list[str] = [*arguments]
        words: list[str] | None = None
        parameters = inspect.signature(function).parameters
        if self.reads_configuration:
            own, words = _split(arguments, self.options)
            parser.add_argument("-c", "--config", help=_CONFIG_HELP)
        skipped: set[str | int] | None = {"config"} if words is not None else None
        parser.add_function_arguments(function, as_positional=self.positional, skip=skipped)
        try:
            options = parser.parse_args(_with_values(function, own))
        except ArgumentError as error:
            sentence = explain(str(error), {name: parser})
            raise ConfigurationError(sentence.replace(", in the configuration file or on", " on")) from None
        given = parser.instantiate_classes(options).as_dict()
        if words is not None:
            if not words and parameters["config"].default is inspect.Parameter.empty:
                raise ConfigurationError("config must be given on the command line: --config FILE, as for fit.")
            given["config"] = Configuration(tuple(words), {name: parser}) if words else None
        result = function(**given)
        if result is not None:
            _print(result)


def _print(result: object) -> None:
    """Print to a reader that may close the pipe early, as ``head`` does."""
    try:
        print(result, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(UNREAD)


UNREAD = 128 + signal.SIGPIPE
"""The exit status after a broken pipe, by shell convention."""
_CONFIG_HELP = """Configuration file of pipelite fit, in YAML or JSON. If given several times, later files override
earlier ones. All options of pipelite fit, such as --trainer.devices, and its environment variables, such as
PIPELITE_FIT__TRAINER__DEVICES, can be used too."""


def _split(arguments: Sequence[str], options: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate a command's own options and their values from all other arguments."""
    mine = {"-h", "--help", *(f"--{name}" for name in options if name != "config")}
    own: list[str] = []
    others: list[str] = []
    part = others
    for word in arguments:
        if word.startswith("-") and not word[1:2].isdigit():  # otherwise it is a value
            part = own if word.partition("=")[0] in mine else others
        part.append(word)
    return own, others


def _with_values(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Expand bare switches: ``--tiny`` becomes ``--tiny=true``."""
    switches = {f"--{name}" for name, each in inspect.signature(function).parameters.items() if each.default is False}
    following = itertools.chain(arguments[1:], [""])
    return [
        f"{word}=true" if word in switches and then not in ("true", "false") else word
        for word, then in zip(arguments, following, strict=False)
    ]


COMMANDS = {
    "plan": Command(
        "lightning_pipelite.cli.plan_command",
        "plan",
        "Estimate how much memory training takes on each GPU, and what fits.",
    ),
    "check": Command(
        "lightning_pipelite.cli.check_command",
        "check",
        "Compare a model split into stages with the same model unsplit.",
        True,
    ),
    "generate": Command(
        "lightning_pipelite.export.generation",
        "generate",
        "Generate text with a base model, with and without an adapter.",
    ),
    "merge": Command("lightning_pipelite.export.merging", "merge", "Merge LoRAs into the weights of their base model."),
    "convert": Command(
        "lightning_pipelite.cli.convert_command",
        "convert",
        "Convert a training checkpoint to an adapter or a model.",
    ),
    "control-to-lora": Command(
        "lightning_pipelite.export.control_lora", "control_to_lora", "Convert a Control Adapter to a LoRA."
    ),
    "export-gguf": Command(
        "lightning_pipelite.export.gguf", "export_gguf", "Write an adapter as a GGUF file for llama.cpp."
    ),
    "analyze": Command(
        "lightning_pipelite.export.analysis", "analyze", "Print and plot statistics of a LoRA or a Control Adapter."
    ),
    "migrate": Command(
        "lightning_pipelite.export.migration", "migrate", "Convert a configuration of qlora-pipe-lite to YAML.", True
    ),
    "preview": Command(
        "lightning_pipelite.cli.preview_command",
        "preview",
        "Show the first packed sequences of a configuration as text.",
    ),
}
