"""What tells one base model from another, without reading its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lightning_pipelite.models.checkpoint import SINGLE_FILE, read_header, read_json

VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that do not change what the weights mean."""
SAMPLES, SAMPLE_BYTES = 64, 64


def fingerprint(model_dir: Path) -> str:
    """A SHA-256 over config.json and the names, shapes, dtypes and sizes of all weights.

    Models that were fine-tuned from one another agree in all of these, so the first bytes of some weights are read too.
    Where the model lies, and how it is cut into files, makes no difference.

    Raises:
        ConfigurationError: if a file is missing or damaged.
    """
    config = {key: value for key, value in read_json(model_dir / "config.json").items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    single = model_dir / SINGLE_FILE
    weights = {
        name: (path, entry)
        for path in ([single] if single.exists() else sorted(model_dir.glob("*.safetensors")))
        for name, entry in read_header(path).items()
    }
    names = sorted(weights)
    for name in names:
        entry = weights[name][1]
        start, stop = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"], stop - start]).encode())
    for name in names[:: max(1, len(names) // SAMPLES)]:
        path, entry = weights[name]
        start, stop = entry["data_offsets"]
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header + start)
            digest.update(file.read(min(SAMPLE_BYTES, stop - start)))
    return digest.hexdigest()
