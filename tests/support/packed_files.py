"""Documents on disk, and packed sequences as plain lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_pipelite.data import DatasetConfig

BOS, EOS = 1, 0


def write_jsonl(path: Path, texts: list[str]) -> DatasetConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DatasetConfig(str(path))


def items(loader: Any) -> list[dict[str, list[int]]]:
    """Return the sequences of a loader's dataset in their order on disk."""
    if loader == []:
        return []
    dataset = loader.dataset
    return [{key: value.tolist() for key, value in dataset[i].items()} for i in range(len(dataset))]


def documents_of(sequences: list[dict[str, list[int]]], prefix: int = 1) -> list[tuple[int, ...]]:
    """Cut the stream at each EOS; padding, which repeats EOS, yields no document."""
    stream = [token for item in sequences for token in item["input_ids"][prefix:]]
    found, document = [], []
    for token in stream:
        document.append(token)
        if token == EOS:
            if len(document) > 1:
                found.append(tuple(document))
            document = []
    assert not document
    return found
