"""Checks of the other commands' options, and of the files that they name, before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_pipelite.adapters.config_file import adapter_settings, lora_settings
from lightning_pipelite.cli.command_options import check_sequences, read_splits
from lightning_pipelite.cli.early import check_model_dir
from lightning_pipelite.cli.early_types import check_types
from lightning_pipelite.cli.option_words import options_of
from lightning_pipelite.cli.signatures import signature_of
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.atomic_output import check_new_directory, check_new_file
from lightning_pipelite.export.base_place import check_base
from lightning_pipelite.export.checkpoint_place import check_checkpoint
from lightning_pipelite.export.migration import Migration
from lightning_pipelite.export.scales import scales_of

if TYPE_CHECKING:
    from lightning_pipelite.cli.commands import Command


def check_command_values(name: str, command: Command, words: Sequence[str]) -> None:
    """Refuse early, by the same rules, what a command would refuse after slow imports.

    Args:
        name: Name of the command.
        command: The command; its options are read from its function's source.
        words: The arguments after the command, whose option names have been checked.

    Raises:
        ConfigurationError: If a value has the wrong type, or names a file or directory that is not what it should be.
    """
    from lightning_pipelite.cli.configuration import Configuration

    if {"-h", "--help"} & {*words}:
        return
    signature = signature_of(f"{command.module}.{command.function}")
    types = signature.types if signature else {}
    options = _own_options(name, command, words, types)
    if name == "preview":
        Configuration(tuple(words)).require_files()
    if name in ("preview", "plan"):  # they always read the options of fit
        check_types(words, may_lack=True)
    check = _CHECKS.get(name)
    needed = {each for each in (signature.required if signature else ()) if types[each] is not None}
    if check is not None and needed <= {*options}:  # otherwise the missing ones are reported later
        check(options)


def _own_options(name: str, command: Command, words: Sequence[str], types: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the values of the command's own options, except switches."""
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_pipelite.cli.error_messages import explain

    given = {each: value for each, value in options_of(words) if value is not None and not value.startswith("--")}
    if command.positional and words and not words[0].startswith("-"):
        given[next(iter(types))] = words[0]
    parser = ArgumentParser(exit_on_error=False)
    known = {each: value for each, value in given.items() if types.get(each) not in (None, bool)}
    for each in known:
        parser.add_argument(f"--{each}", type=types[each])
    try:
        return parser.parse_object(known).as_dict()
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), {name: parser})) from None


def _check_merge(options: Mapping[str, Any]) -> None:
    base, adapter = options["base"], options["adapter"]
    adapters = [Path(each) for each in ([adapter] if isinstance(adapter, str) else adapter)]
    scales_of(options.get("scale"), len(adapters))
    check_new_directory(Path(options["output"]), [Path(base), *adapters])
    check_base(Path(base))
    for each in adapters:
        lora_settings(each)


def _check_control_to_lora(options: Mapping[str, Any]) -> None:
    check_new_directory(Path(options["output"]), [Path(options["base"]), Path(options["adapter"])])
    check_base(Path(options["base"]))


def _check_export_gguf(options: Mapping[str, Any]) -> None:
    check_new_file(Path(options["output"]))
    adapter_settings(Path(options["adapter"]))
    check_base(Path(options["base"]))


def _check_analyze(options: Mapping[str, Any]) -> None:
    if options.get("base") is not None:
        check_base(Path(options["base"]))
    adapter_settings(Path(options["adapter"]))


def _check_stages(options: Mapping[str, Any]) -> None:
    check_model_dir(options["model_dir"])
    if "stages" in options:
        read_splits(options["stages"])


_CHECKS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "analyze": _check_analyze,
    "check": _check_stages,
    "control-to-lora": _check_control_to_lora,
    "convert": lambda options: check_checkpoint(options["checkpoint"]),
    "export-gguf": _check_export_gguf,
    "merge": _check_merge,
    "migrate": lambda options: Migration(Path(options["config"])),
    "preview": lambda options: check_sequences(options.get("sequences", 1)),
}
