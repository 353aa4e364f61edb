"""What a format of quantised files has to tell: which tensors make a weight, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError

Entries = Mapping[str, Mapping[str, Any]]
"""What the headers of the files say of each tensor, by name: ``dtype``, as safetensors call it, and ``shape``."""

Keeps = Literal["load_in_4bit", "load_in_fp8"]
Read = Callable[[str], Tensor]
"""Reads a tensor of the files, by its name; for those that say what others are."""


@dataclass(frozen=True)
class Quantised:
    """A weight of the model that several tensors of the files make.

    Attributes:
        name: Of the weight, as it would be called in files that are not quantised.
        shape: Its shape there.
        parts: Names of the tensors that make it, in the order in which ``dequantise`` takes them.
        dequantise: Makes the weight of the parts, in a given type.
        unused: Names of tensors that belong with it and make nothing of it, such as scales of activations.
        kept: Makes of the parts what holds the weight as the files do, without dequantising it: codes and bitsandbytes'
            state of them, or FP8's codes and a scale for each row. None where nothing does.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    dequantise: Callable[[list[Tensor], torch.dtype], Tensor]
    unused: tuple[str, ...] = ()
    kept: Callable[[list[Tensor]], tuple[Tensor, Any]] | None = None


class Format(Protocol):
    """A way in which files hold weights in fewer bits, as a ``quantization_config`` describes it.

    Attributes:
        title: What it is called.
        bits: About how many a quantised weight has, with its scales.
        keeps: The option with which weights are held as the files have them; None if there is none.
        double_quant: Whether those that load_in_4bit keeps have scales that are quantised too.
    """

    title: str
    bits: float
    keeps: Keeps | None
    double_quant: bool

    def find(self, entries: Entries, read: Read) -> Iterator[Quantised]:
        """Yield the quantised weights among the tensors of the files.

        Args:
            entries: Of all tensors, what the headers say.
            read: For the few small ones that say what a weight is.

        Raises:
            ConfigurationError: A tensor of the format is missing, or its type or shape does not fit.
        """


def refuse_unknown(config: Mapping[str, Any], known: Mapping[str, Iterable[Any] | None]) -> None:
    """Refuse what a ``quantization_config`` says beyond what is ``known``.

    Args:
        config: The ``quantization_config``.
        known: The keys that it may have, each with the values that it may have; None where any value means the same.

    Raises:
        ConfigurationError: It has another key, or another value.
    """
    for key, value in config.items():
        if key == "quant_method":
            continue
        if key not in known and value is not None:
            raise ConfigurationError(
                f"quantization_config has {key}, which is not known of files in {config['quant_method']}; give the "
                "model in bfloat16."
            )
        if (values := known.get(key)) is not None and value not in (values := list(values)):
            raise ConfigurationError(
                f"quantization_config: {key} is {value!r}, and files in {config['quant_method']} are read where it is "
                f"{' or '.join(map(repr, values))}; give the model in bfloat16."
            )


def misfit(name: str, reason: str) -> ConfigurationError:
    """Return the error of a tensor that is not as its format wants it."""
    return ConfigurationError(f"the quantised weight {name} {reason}; fetch the model again.")


def shape_of(entries: Entries, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor of the files."""
    return tuple(entries[name]["shape"])


def part(entries: Entries, weight: str, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> str:
    """Return ``name`` after checking that the files hold this part of ``weight``, of type and shape.

    Raises:
        ConfigurationError: They do not.
    """
    if name not in entries:
        raise misfit(weight, f"lacks its tensor {name}")
    dtypes = list(dtypes)
    if entries[name]["dtype"] not in dtypes:
        raise misfit(weight, f"has its tensor {name} in {entries[name]['dtype']}, and not in {' or '.join(dtypes)}")
    if shape is not None and shape_of(entries, name) != shape:
        raise misfit(weight, f"wants its tensor {name} in shape {list(shape)}, and not {entries[name]['shape']}")
    return name
