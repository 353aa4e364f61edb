"""The weight files of a model directory, checked from their headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BASE_FILE = "base_model.json"  # in an adapter's directory: what it was trained on
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them
# The safetensors format caps its header at 100 MB; a larger length means a damaged file, not a larger header.
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
        raise ConfigurationError(f"{path} has {size} bytes but its header requires {expected}; fetch it again.")
    return header


def refuse_adapter_beside(model_dir: Path) -> None:
    """Reject a model directory that also holds an adapter: transformers' from_pretrained would silently load it too.

    Raises:
        ConfigurationError: It holds one.
    """
    if (model_dir / "adapter_config.json").exists():
        raise ConfigurationError(f"{model_dir} also holds an adapter_config.json; merge that adapter or move it away.")


def check_weights(model_dir: Path, *, allow_pickled: bool = False) -> dict[str, dict[str, Any]]:
    """Check that every weight file of ``model_dir`` exists and is complete, reading headers only.

    Args:
        model_dir: Directory of the model.
        allow_pickled: Whether pickled weights are accepted if there are no safetensors.

    Returns:
        The headers of the safetensors files, by file name; none if the weights are pickled.

    Raises:
        ConfigurationError: There are no weights, a shard is missing or truncated, or a shard does not hold a weight
            that the index places in it.
    """
    if (model_dir / SINGLE_FILE).exists():  # transformers also looks for the single file first
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
    """Return the names of a model's weight files that do not exist, as during a download.

    Existing files are checked. Without an index or any weight file, the single file counts as missing.

    Raises:
        ConfigurationError: An existing file is damaged.
    """
    files = weight_files(model_dir)
    if not files:
        return [] if any(model_dir.glob("*.bin")) else [SINGLE_FILE]
    for path in files:
        if path.exists():
            read_header(path)
    return [path.name for path in files if not path.exists()]


def weight_files(model_dir: Path) -> list[Path]:
    """Return the model's safetensors files, not always all those in its directory; none if weights are pickled.

    Raises:
        ConfigurationError: The index is unusable.
    """
    if (model_dir / SINGLE_FILE).exists():
        return [model_dir / SINGLE_FILE]
    index = model_dir / INDEX_FILE
    return [model_dir / shard for shard in sorted(set(_weight_map(index).values()))] if index.exists() else []


def pickled_files(model_dir: Path) -> list[Path]:
    """Return the model's files of pickled weights."""
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
