"""Fingerprints of base models, from a small part of their files, and the check of an adapter against its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.companions import own_code
from lightning_pipelite.models.weight_files import BASE_FILE, pickled_files, read_header, read_json, weight_files

VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that do not change the meaning of weights. Adding one would invalidate existing checkpoints."""
SAMPLES, SAMPLE_BYTES = 64, 64
"""Roughly how many weights are sampled, and how many bytes of each are read at most."""
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Described = tuple[list[object], Callable[[], bytes]]
"""A weight's dtype, shape and size, and a function that reads its first bytes."""


def fingerprint(model_dir: Path) -> str:
    """Hash config.json, names, shapes, dtypes and sizes of all weights, and custom code with SHA-256.

    Models that were fine-tuned from one another agree in all of these, so the first bytes of some weights are hashed
    too. The location of the model and its split into files make no difference, nor do files that its index omits.

    Raises:
        ConfigurationError: If a file is missing or damaged.
    """
    config = {key: value for key, value in read_json(model_dir / "config.json").items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    weights: dict[str, Described] = {}
    for path in weight_files(model_dir):
        weights |= _in_safetensors(path)
    for path in () if weights else pickled_files(model_dir):
        weights |= _pickled(path)
    names = sorted(weights)
    for name in names:
        digest.update(json.dumps([name, *weights[name][0]]).encode())
    for name in names[:: max(1, len(names) // SAMPLES)]:
        digest.update(weights[name][1]())
    for path in own_code(model_dir):
        digest.update((model_dir / path).read_bytes())
    return digest.hexdigest()


def refuse_another_base(adapter: Path, base: Path) -> None:
    """Refuse an adapter that was trained on another base, as far as this is known.

    The base is known from the fingerprint that this project writes beside the adapter, otherwise from the directory
    that adapter_config.json names, if it still exists.

    Raises:
        ConfigurationError: The adapter was trained on another base.
    """
    if not (adapter / "adapter_config.json").is_file():  # not an adapter: reported by the code that reads it
        return
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    path = adapter / BASE_FILE
    trained_on = read_json(path).get("fingerprint") if path.is_file() else None
    if trained_on is None and named and isinstance(named, str):
        trained_on = _fingerprint_if_whole(Path(named))
    if trained_on is not None and trained_on != fingerprint(base):
        raise ConfigurationError(
            f"{adapter} was trained on another base than {base}: its adapter_config.json names {named or 'none'}; use "
            "that base, or set allow_another_base to true."
        )


def record_base(adapter: Path, base: str) -> None:
    """Write the fingerprint ``base`` of the model that an adapter was trained on into the adapter's directory.

    It has a file of its own because PEFT warns of unknown keys in its configuration, and safetensors does not always
    write its metadata in the same order.
    """
    (adapter / BASE_FILE).write_text(json.dumps({"fingerprint": base}) + "\n", encoding="utf-8")


def _fingerprint_if_whole(model_dir: Path) -> str | None:
    """Return the fingerprint of the model in ``model_dir``, or None unless all its files exist and can be read."""
    if not (model_dir / "config.json").is_file():
        return None
    try:
        files = weight_files(model_dir) or pickled_files(model_dir)
        return fingerprint(model_dir) if all(path.is_file() for path in files) else None
    except ConfigurationError:  # reported by the code that needs that model
        return None


def _in_safetensors(path: Path) -> dict[str, Described]:
    def first_bytes(start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header + start)
            return file.read(min(SAMPLE_BYTES, stop - start))

    described: dict[str, Described] = {}
    for name, entry in read_header(path).items():
        start, stop = entry["data_offsets"]
        about = [entry["dtype"], entry["shape"], stop - start]
        described[name] = about, lambda start=start, stop=stop: first_bytes(start, stop)  # type: ignore[misc]
    return described


def _pickled(path: Path) -> dict[str, Described]:
    """Describe the weights of a pickled file, which is memory-mapped and read only in part unless its format is old."""
    try:
        try:
            state = torch.load(path, "cpu", weights_only=True, mmap=True)
        except RuntimeError:
            state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the damage
        raise ConfigurationError(f"{path} cannot be read ({error}); fetch it again.") from None

    def first_bytes(tensor: Tensor) -> bytes:
        first = tensor.flatten()[: -(-SAMPLE_BYTES // tensor.element_size())]
        return first.contiguous().view(torch.uint8).numpy().tobytes()[:SAMPLE_BYTES]

    return {
        name: (
            [TYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape), tensor.nbytes],
            lambda tensor=tensor: first_bytes(tensor),  # type: ignore[misc]
        )
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
