"""Encodes Python objects as JSON and tensors, and back: a closed set of types, so that reading never runs code."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError

INFORMATION = ("hyper_parameters", "datamodule_hyper_parameters")
"""Keys of Lightning's checkpoint that nothing is restored from: containers of other types become dicts and lists there,
and what cannot be encoded is kept as text."""


def encode(value: Any, tensors: dict[str, Tensor], where: str = "") -> Any:
    """Encode ``value`` for JSON; tensors and arrays go into ``tensors``.

    None, bools, integers, finite floats, strings, lists, and dicts with plain string keys are encoded as themselves.
    Anything else becomes a dict with one key, which begins with ``$``: see docs/checkpoints.md.

    Args:
        value: Any combination of the types above and those of :func:`_tagged`.
        tensors: Filled with the tensors found, under the names by which the result refers to them.
        where: Path to ``value``, for the error message.

    Raises:
        ConfigurationError: If there is a value of another type; the message names its path.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), tensors, where)
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) is list:
        return [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) in (dict, OrderedDict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode(item, tensors, _step(where, key)) for key, item in value.items()}
        return {"$dict": _pairs(value, tensors, where)}
    return _tagged(value, tensors, where)


def _tagged(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        if value.is_sparse or value.is_quantized or value.is_meta:
            raise _refusal(value, where)
        return {"$tensor": _keep(value.detach(), tensors, where)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"$array": _keep(torch.from_numpy(np.array(value)), tensors, where)}
    if type(value) is torch.Size:
        return {"$size": list(value)}
    if type(value) is tuple:
        return {"$tuple": [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]}
    if type(value) in (set, frozenset):
        items = [encode(item, tensors, where) for item in value]
        return {f"${type(value).__name__}": sorted(items, key=repr)}
    if type(value) is Counter:  # the milestones of torch's MultiStepLR
        return {"$counter": _pairs(value, tensors, where)}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, (torch.dtype, torch.device)):
        return {f"${type(value).__name__}": str(value).removeprefix("torch.")}
    if where.startswith(INFORMATION):
        if isinstance(value, Mapping):  # such as OmegaConf's, which resolves references on access
            return encode(_read(value, value.keys(), dict), tensors, where)
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return encode(_read(value, range(len(value)), lambda pairs: [item for _, item in pairs]), tensors, where)
        return {"$text": repr(value)}
    raise _refusal(value, where)


def _read(container: Any, keys: Iterable[Any], make: Callable[[list[tuple[Any, Any]]], Any]) -> Any:
    """Return a plain container with the items of another one.

    An item that cannot be read, such as a missing value, is replaced by the error's text.
    """
    pairs = []
    for key in keys:
        try:
            pairs.append((key, container[key]))
        except Exception as error:
            pairs.append((key, f"({error})"))
    return make(pairs)


def _refusal(value: Any, where: str) -> ConfigurationError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor) and value.is_meta:
        return ConfigurationError(
            f"the checkpoint cannot hold {where}, a tensor of a layer on another process: keep what belongs to a layer "
            "in one of its buffers, or leave it out of that state_dict()."
        )
    return ConfigurationError(
        f"the checkpoint cannot hold {where}, a {kind}: use numbers, strings, lists, tuples, dicts and tensors "
        "instead, or leave it out of that state_dict()."
    )


def _pairs(value: Mapping[Any, Any], tensors: dict[str, Tensor], where: str) -> list[list[Any]]:
    return [
        [encode(key, tensors, f"{where} (key {key!r})"), encode(item, tensors, _step(where, key))]
        for key, item in value.items()
    ]


def _step(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _keep(tensor: Tensor, tensors: dict[str, Tensor], where: str) -> str:
    name = where if where not in tensors else f"{where} ({len(tensors)})"
    tensors[name] = tensor
    return name


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Decode the result of :func:`encode`.

    Raises:
        ConfigurationError: If there is a tag that this version does not know.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    content = value[tag]
    if tag in ("$tensor", "$array"):
        return tensors[content].clone() if tag == "$tensor" else tensors[content].numpy().copy()
    if tag in ("$dict", "$counter"):
        pairs = {decode(key, tensors): decode(item, tensors) for key, item in content}
        return pairs if tag == "$dict" else Counter(pairs)
    if tag in ("$tuple", "$set", "$frozenset", "$size"):
        made = {"$tuple": tuple, "$set": set, "$frozenset": frozenset, "$size": torch.Size}[tag]
        return made(decode(content, tensors))
    if tag == "$float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if tag == "$dtype" and isinstance(dtype := getattr(torch, content, None), torch.dtype):
        return dtype
    if tag == "$device":
        return torch.device(content)
    if tag in ("$path", "$text"):
        return Path(content) if tag == "$path" else content
    raise ConfigurationError(
        f"the checkpoint holds a value of type {tag}, which this version of pipelite cannot read; use the version that "
        "wrote it."
    )
