"""The settings in a configuration that a plan needs."""

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
        sequence_len: Tokens per micro-batch.
        micro_batches: Micro-batches per step.
        stages: Number of pipeline stages.
        virtual_stages: Pieces per stage.
        partition_method: How layers are assigned to stages.
        devices: Devices per host; None if this is left to the Trainer.
        hosts: Number of hosts.
        speeds: The strategy's ``speeds`` of the devices; empty if not given.
        column_major: The strategy's ``use_column_major_topology``.
        optimizer: ``class_path`` and ``init_args`` of the optimizer.
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
    """Extract what a plan needs from a configuration.

    Args:
        content: The options of ``pipelite fit``, by section.
        source: Where they were given, for messages.

    Raises:
        ConfigurationError: If something that a plan needs is missing or wrong.
    """
    trainer, model, data = (content[name] for name in ("trainer", "model", "data"))
    for name, value in (("model.model_dir", model.get("model_dir")), ("model.adapter", model.get("adapter"))):
        if not value:
            raise ConfigurationError(f"{source}: {name} must be given for a plan.")
    strategy = trainer.get("strategy")
    options = _strategy_options(strategy, source)
    check_speeds(options.get("speeds"), "auto")  # the method that a plan recommends if speeds are given
    devices = trainer.get("devices")
    if isinstance(devices, str):  # as Lightning reads it: a count, or indices
        devices = [each for each in devices.split(",") if each.strip()] if "," in devices else _number(devices)
    if isinstance(devices, list):  # indices
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
    """Return the options of the strategy, which must be PipeLiteStrategy."""
    given = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy
    if given is not None and str(given).rpartition(".")[2] not in ("PipeLiteStrategy", "pipelite"):
        raise ConfigurationError(
            f"{source}: trainer.strategy is {given}, which does not train in stages; set it to pipelite."
        )
    return strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*\d+\s*", text) else None  # "auto", "-1": all devices


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1, not {value!r}.")
    return value


def class_of(given: Any, key: str, package: str, given_here: tuple[str, ...] = ()) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options of a ``class_path`` with ``init_args``.

    Args:
        given: A mapping of the two, or the name of a class.
        key: Its name in the configuration.
        package: Package of classes that are given without one.
        given_here: Arguments that the caller supplies, not the configuration.

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
    """Return the bytes of ``24GiB``, ``80 GB`` or ``24``, which means GiB, as graphics cards are sold.

    Raises:
        ConfigurationError: If it is malformed, or implausible for a GPU.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigurationError(f"memory is {text!r}; give a size such as 24GiB or 80GB.")
    size = int(float(match[1]) * units[match[2].lower()])
    if not LEAST <= size <= MOST:
        told = f"{match[1]} GiB" if not match[2] else gib(size)
        raise ConfigurationError(f"memory is {text!r}, which is {told}; give that of one GPU, such as 24GiB or 80GB.")
    return size


def gib(size: float) -> str:
    """Format a number of bytes with a unit."""
    for unit, base in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= 0.1 * base:
            return f"{size / base:.2f} {unit}" if unit == "GiB" else f"{size / base:.1f} {unit}"
    return f"{size:.0f} bytes"


def dtype_of(model: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the computation.

    Raises:
        ConfigurationError: If the module does not take it.
    """
    name = model.get("dtype", "bfloat16")
    if name not in ("bfloat16", "float32"):
        raise ConfigurationError(f"model.dtype must be bfloat16 or float32, not {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
