"""The interface of a format of quantised files: which tensors make up a weight, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError

Entries = Mapping[str, Mapping[str, Any]]
"""The header entry of each tensor in the files, by name: ``dtype``, as safetensors names it, and ``shape``."""

Keeps = Literal["load_in_4bit", "load_in_fp8"]
Read = Callable[[str], Tensor]
"""Reads a tensor of the files by name; for tensors that describe others."""


@dataclass(frozen=True)
class Quantised:
    """A weight of the model that is made up of several tensors of the files.

    Attributes:
        name: Name of the weight in files that are not quantised.
        shape: Its shape there.
        parts: Names of the tensors that make it up, in the order in which ``dequantise`` takes them.
        dequantise: Computes the weight from the parts, in a given dtype.
        unused: Names of tensors that belong to it but are not needed, such as scales of activations.
        kept: Returns, from the parts, the weight as the files hold it, not dequantised: bitsandbytes' codes and state,
            or FP8 codes and a scale for each row. None if it cannot be held so.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    dequantise: Callable[[list[Tensor], torch.dtype], Tensor]
    unused: tuple[str, ...] = ()
    kept: Callable[[list[Tensor]], tuple[Tensor, Any]] | None = None


class Format(Protocol):
    """A format in which files hold quantised weights, as a ``quantization_config`` describes it.

    Attributes:
        title: Its name in messages.
        bits: Approximate bits per quantised weight, including its scales.
        keeps: The option with which weights are held as the files have them; None if there is none.
        double_quant: Whether the scales of weights that load_in_4bit keeps are quantised too.
    """

    title: str
    bits: float
    keeps: Keeps | None
    double_quant: bool

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights among the tensors of the files.

        Args:
            entries: The header entries of all tensors.
            read: Reads the few small tensors that describe a weight.

        Raises:
            ConfigurationError: A tensor of the format is missing, or its dtype or shape does not fit.
        """


def refuse_unknown(config: Mapping[str, Any], known: Mapping[str, Iterable[Any] | None]) -> None:
    """Reject a ``quantization_config`` with keys or values that are not ``known``.

    Args:
        config: The ``quantization_config``.
        known: The keys that it may have, each with its permitted values; None if its value makes no difference here.

    Raises:
        ConfigurationError: It has another key, or another value.
    """
    for key, value in config.items():
        if key == "quant_method":
            continue
        if key not in known and value is not None:
            raise ConfigurationError(
                f"quantization_config has {key}, which is not supported for files in {config['quant_method']}; use a "
                "bfloat16 version of the model."
            )
        if (values := known.get(key)) is not None and value not in (values := list(values)):
            raise ConfigurationError(
                f"quantization_config: {key} is {value!r}, but files in {config['quant_method']} are supported only if "
                f"it is {' or '.join(map(repr, values))}; use a bfloat16 version of the model."
            )


def misfit(name: str, reason: str) -> ConfigurationError:
    """Return the error for a tensor that does not fit its format."""
    return ConfigurationError(f"the quantised weight {name} {reason}; fetch the model again.")


def shape_of(entries: Entries, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in the files."""
    return tuple(entries[name]["shape"])


def part(entries: Entries, weight: str, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> str:
    """Return ``name`` after checking that the files hold this part of ``weight`` with the given dtype and shape.

    Raises:
        ConfigurationError: They do not.
    """
    if name not in entries:
        raise misfit(weight, f"lacks its tensor {name}")
    dtypes = list(dtypes)
    if entries[name]["dtype"] not in dtypes:
        raise misfit(weight, f"has its tensor {name} in {entries[name]['dtype']}, not in {' or '.join(dtypes)}")
    if shape is not None and shape_of(entries, name) != shape:
        raise misfit(weight, f"requires its tensor {name} to have shape {list(shape)}, not {entries[name]['shape']}")
    return name
