"""What a configuration file says about a training, as far as a plan needs it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.device_speeds import check_speeds

UNITS = {"": 2**30, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, base in ((f"{letter}iB", 1024), (f"{letter}B", 1000), (letter, 1024))
}
LEAST, MOST = 100 * 2**20, 4 * 2**40  # bytes of a GPU
OPTIMIZER = {"class_path": "optimi.Adam", "init_args": {}}


@dataclass
class Settings:
    """What a plan needs of a configuration.

    Attributes:
        model: The options of ``PipeLiteModule``.
        sequence_len: Tokens of a micro-batch.
        micro_batches: Of a step.
        stages: Of the pipeline.
        virtual_stages: Pieces of each stage.
        partition_method: How the layers are dealt out.
        devices: Of a host; None if the file leaves it to the Trainer.
        hosts: How many there are.
        speeds: Of the devices, as the strategy is told; empty if it is not.
        column_major: The strategy's ``use_column_major_topology``.
    """

    model: dict[str, Any]
    sequence_len: int
    micro_batches: int
    stages: int = 1
    virtual_stages: int = 1
    partition_method: str = "uniform"
    devices: int | None = None
    hosts: int = 1
    speeds: tuple[float, ...] = ()
    column_major: bool = False
    optimizer: dict[str, Any] = field(default_factory=lambda: OPTIMIZER)


def settings_of(content: Mapping[str, Any], source: str) -> Settings:
    """Take what a plan needs of a configuration.

    Args:
        content: The options of ``pipelite fit``, by sections.
        source: Where they were given, for messages.

    Raises:
        ConfigurationError: If it lacks what a plan needs.
    """
    trainer, model, data = (content[name] for name in ("trainer", "model", "data"))
    for name, value in (("model.model_dir", model.get("model_dir")), ("model.adapter", model.get("adapter"))):
        if not value:
            raise ConfigurationError(f"{source}: {name} must be given for a plan.")
    strategy = trainer.get("strategy")
    options = _strategy_options(strategy, source)
    check_speeds(options.get("speeds"), "auto")  # which a plan recommends where they are given
    devices = trainer.get("devices")
    if isinstance(devices, str):  # as Lightning reads it: a number, or numbers of devices
        devices = [each for each in devices.split(",") if each.strip()] if "," in devices else _number(devices)
    if isinstance(devices, list):  # their numbers
        devices = len(devices)
    return Settings(
        model=model,
        sequence_len=_count(data.get("sequence_len"), f"{source}: data.sequence_len"),
        micro_batches=_count(trainer.get("accumulate_grad_batches") or 1, f"{source}: trainer.accumulate_grad_batches"),
        stages=_count(options.get("pipeline_stages", 1), f"{source}: pipeline_stages"),
        virtual_stages=_count(options.get("virtual_stages", 1), f"{source}: virtual_stages"),
        partition_method=str(options.get("partition_method", "uniform")),
        devices=devices if type(devices) is int and devices > 0 else None,
        hosts=_count(trainer.get("num_nodes") or 1, f"{source}: trainer.num_nodes"),
        speeds=tuple(options.get("speeds") or ()),
        column_major=bool(options.get("use_column_major_topology")),
        optimizer=model.get("optimizer") or OPTIMIZER,
    )


def _strategy_options(strategy: Any, source: str) -> Mapping[str, Any]:
    """Return the options of the strategy, which must be the one that trains in stages."""
    given = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy
    if given is not None and str(given).rpartition(".")[2] not in ("PipeLiteStrategy", "pipelite"):
        raise ConfigurationError(
            f"{source}: trainer.strategy is {given}, which does not train in stages; set it to pipelite."
        )
    return strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*\d+\s*", text) else None  # "auto", "-1": all that there are


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1, not {value!r}.")
    return value


def class_of(given: Any, key: str, package: str, given_here: tuple[str, ...] = ()) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options of a ``class_path`` with ``init_args``.

    Args:
        given: A mapping of the two, or the name of a class.
        key: What it is called in the configuration.
        package: Where a class without a package is looked for.
        given_here: Arguments of it that no configuration has.

    Raises:
        ConfigurationError: If there is no such class, or it does not take these options.
    """
    if isinstance(given, str):
        given = {"class_path": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("class_path"), str):
        raise ConfigurationError(f"{key} must be a mapping with a class_path, not {given!r}.")
    path = given["class_path"]
    module, _, name = (path if "." in path else f"{package}.{path}").rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{key}: class_path {path} cannot be imported ({error}); correct it.") from None
    known = inspect.signature(kind).parameters
    optional = {name for name, each in known.items() if each.default is not each.empty}
    given_options = given.get("init_args") or {}
    options = {name: value for name, value in given_options.items() if value is not None or name in optional}
    if unknown := [option for option in options if option not in known]:
        raise ConfigurationError(f"{key}.{unknown[0]} is not an option; {name} has {', '.join(known)}.")
    missing = [n for n, each in known.items() if each.default is each.empty and n not in (*options, *given_here)]
    if missing:
        raise ConfigurationError(f"{key}.{missing[0]} must be given.")
    return kind, dict(options)


def parse_memory(text: str) -> int:
    """Return the bytes of ``24GiB``, ``80 GB``, or of ``24``, which is taken for GiB, as graphics cards are sold.

    Raises:
        ConfigurationError: If it is none of these, or cannot be a GPU's.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigurationError(f"memory is {text!r}; write it as in 24GiB or 80GB.")
    size = int(float(match[1]) * units[match[2].lower()])
    if not LEAST <= size <= MOST:
        told = f"{match[1]} GiB" if not match[2] else gib(size)
        raise ConfigurationError(f"memory is {text!r}, which is {told}; write that of one GPU, as in 24GiB or 80GB.")
    return size


def gib(size: float) -> str:
    """Return bytes in words."""
    for unit, base in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= 0.1 * base:
            return f"{size / base:.2f} {unit}" if unit == "GiB" else f"{size / base:.1f} {unit}"
    return f"{size:.0f} bytes"


def dtype_of(model: Mapping[str, Any]) -> torch.dtype:
    """Return the type of the computation.

    Raises:
        ConfigurationError: If it is none that the module takes.
    """
    name = model.get("dtype", "bfloat16")
    if name not in ("bfloat16", "float32"):
        raise ConfigurationError(f"model.dtype must be bfloat16 or float32, not {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
