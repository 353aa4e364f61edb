"""The weight files of a model directory, checked from their headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BASE_FILE = "base_model.json"  # of an adapter: what it was trained on
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors call them
# The safetensors format caps its header at 100 MB; a larger length is a damaged file, not a larger header.
MAX_HEADER_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        ConfigurationError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist; give the directory of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON ({error}); fetch the file again.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object; fetch the file again.")
    return content


def read_header(path: Path) -> dict[str, Any]:
    """Return the tensors that the header of a safetensors file lists, by name, after checking the file's length.

    The layout is an unsigned 64-bit little-endian header length, the JSON header, then the data that the header's
    ``data_offsets`` cover without a gap (https://github.com/huggingface/safetensors#format).

    Raises:
        ConfigurationError: The header does not parse or the file is not as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("the file ends inside its header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist; fetch the missing weight file.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None
    if size != expected:
        raise ConfigurationError(f"{path} has {size} bytes but its header asks for {expected}; fetch it again.")
    return header


def refuse_adapter_beside(model_dir: Path) -> None:
    """Refuse a model beside which there is an adapter: transformers' from_pretrained would quietly load it as well.

    Raises:
        ConfigurationError: There is one.
    """
    if (model_dir / "adapter_config.json").exists():
        raise ConfigurationError(f"{model_dir} also holds an adapter_config.json; merge that adapter or move it away.")


def check_weights(model_dir: Path, *, allow_pickled: bool = False) -> dict[str, dict[str, Any]]:
    """Check that every weight file of ``model_dir`` is there and whole, reading headers only.

    Args:
        model_dir: Directory of the model.
        allow_pickled: Whether pickled weights will do where there are no safetensors.

    Returns:
        The headers of the safetensors files, by their names; none if the weights are pickled.

    Raises:
        ConfigurationError: No weights, a missing or truncated shard, or a weight that the index names and its shard
            does not hold.
    """
    if (model_dir / SINGLE_FILE).exists():  # transformers, too, looks for the single file first
        return {SINGLE_FILE: read_header(model_dir / SINGLE_FILE)}
    index = model_dir / INDEX_FILE
    if not index.exists():
        if any(model_dir.glob("*.bin")):
            _check_pickled(model_dir, allow_pickled)
            return {}
        raise ConfigurationError(f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the model's weights.")
    weight_map = _weight_map(index)
    held = {shard: read_header(model_dir / shard) for shard in sorted(set(weight_map.values()))}
    for weight, shard in weight_map.items():
        if weight not in held[shard]:
            raise ConfigurationError(
                f"{index} places the weight {weight} in {shard}, which does not hold it; fetch both files again."
            )
    return held


def missing_files(model_dir: Path) -> list[str]:
    """Return the names of the weight files that belong to a model and are not there, as while it is downloaded.

    Those that are there are checked. Without any file that would name them it is the single file that is missing.

    Raises:
        ConfigurationError: A file that is there is damaged.
    """
    files = weight_files(model_dir)
    if not files:
        return [] if any(model_dir.glob("*.bin")) else [SINGLE_FILE]
    for path in files:
        if path.exists():
            read_header(path)
    return [path.name for path in files if not path.exists()]


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files that belong to the model, which need not be all of its directory; none if pickled.

    Raises:
        ConfigurationError: The index cannot be used.
    """
    if (model_dir / SINGLE_FILE).exists():
        return [model_dir / SINGLE_FILE]
    index = model_dir / INDEX_FILE
    return [model_dir / shard for shard in sorted(set(_weight_map(index).values()))] if index.exists() else []


def pickled_files(model_dir: Path) -> list[Path]:
    """Return the files of pickled weights that belong to the model."""
    index = model_dir / PICKLED_INDEX_FILE
    shards = set(_weight_map(index).values()) if index.exists() else {PICKLED_FILE}
    return [model_dir / shard for shard in sorted(shards)]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConfigurationError(f"{index} has no usable weight_map; fetch the file again.")
    return weight_map


def _check_pickled(model_dir: Path, allowed: bool) -> None:
    if not allowed:
        raise ConfigurationError(
            f"{model_dir} has pickled weights (.bin) only; convert them to safetensors, or set allow_pickled_weights "
            "to true if you trust who made them."
        )
    for path in pickled_files(model_dir):
        if not path.is_file():
            raise ConfigurationError(f"{path} does not exist; fetch the missing weight file.")
