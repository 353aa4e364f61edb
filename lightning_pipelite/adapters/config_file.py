"""Reads the adapter_config.json of an adapter's directory, as JSON; it imports nothing slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.weight_files import read_json

CONFIG_FILE = "adapter_config.json"
CONTROL_ADAPTER = "CONTROL_ADAPTER"
"""The ``peft_type`` of a Control Adapter. PEFT does not know it, and so refuses the directory."""


def adapter_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of an adapter of any kind.

    Raises:
        ConfigurationError: The directory holds no adapter.
    """
    if not (directory / CONFIG_FILE).exists():
        raise ConfigurationError(f"{directory} has no {CONFIG_FILE}; give the directory of an adapter.")
    return read_json(directory / CONFIG_FILE)


def lora_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of a LoRA.

    Raises:
        ConfigurationError: The directory holds no adapter, or one of another kind.
    """
    if not (directory / CONFIG_FILE).exists():
        raise ConfigurationError(f"{directory} has no {CONFIG_FILE}; give the directory of a PEFT adapter.")
    given = read_json(directory / CONFIG_FILE)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise ConfigurationError(f"{directory} is an adapter of type {kind}, not a LoRA; choose a LoRA.")
    return given
