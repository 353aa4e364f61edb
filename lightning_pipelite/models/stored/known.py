"""The supported formats of quantised files, and the errors for all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Conv1D

from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.models.stored.awq import Awq
from lightning_pipelite.models.stored.bnb import BitsAndBytes
from lightning_pipelite.models.stored.compressed_tensors import CompressedTensors
from lightning_pipelite.models.stored.format import Format
from lightning_pipelite.models.stored.fp8 import Fp8
from lightning_pipelite.models.stored.gptq import Gptq
from lightning_pipelite.models.stored.mxfp4 import Mxfp4
from lightning_pipelite.models.weight_files import read_json

KNOWN: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "mxfp4": Mxfp4,
    "fp8": Fp8,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
}
"""The formats by ``quant_method``."""
KEYS = ("quantization_config", "compression_config")  # the second is from old versions of compressed-tensors


def stored_format(model_dir: Path) -> Format | None:
    """Return the format in which the files of ``model_dir`` hold quantised weights; None if they hold none.

    Raises:
        ConfigurationError: The format is not supported.
    """
    path = model_dir / "config.json"
    config = read_json(path)
    text = config.get("text_config")
    described = [
        part[key] for part in (config, text) if isinstance(part, dict) for key in KEYS if part.get(key) is not None
    ]
    if not described:
        return None
    first = described[0]
    if any(each != first for each in described[1:]) or not isinstance(first, dict):
        raise ConfigurationError(f"{path} has no usable quantization_config; fetch the file again.")
    method = first.get("quant_method")
    if not isinstance(method, str) or method not in KNOWN:
        raise ConfigurationError(
            f"{path} has a quantization_config with quant_method {method}, which is not supported (only "
            f"{', '.join(KNOWN)} are); use the original model, and set load_in_4bit to quantise it."
        )
    try:
        return KNOWN[method](first)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {first_line(error)}") from None


def refuse_transposed(stored: Format | None, model: nn.Module, model_dir: Path) -> None:
    """Reject quantised files of a model with transformers' Conv1D, whose weights are transposed.

    Raises:
        ConfigurationError: It has such a layer: a square weight would silently be read the wrong way round.
    """
    if stored is not None and any(isinstance(module, Conv1D) for module in model.modules()):
        raise ConfigurationError(
            f"{model_dir} is in {stored.title}, which is not supported for models with Conv1D layers; use the "
            "original model."
        )


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without the keys that ``stored_format`` reads, including the text model's."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = unquantised(plain["text_config"])
    return plain


def in_plain(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json for a model whose quantised weights are written dequantised, mostly in ``dtype``."""
    plain = {key: value for key, value in config.items() if key not in (*KEYS, "torch_dtype")}
    plain["dtype"] = dtype
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = in_plain(plain["text_config"], dtype)
    return plain
