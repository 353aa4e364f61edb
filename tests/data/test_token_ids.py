"""Token ids that a user gives are checked with the tokenizer's file alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_pipelite.data.config import DatasetConfig, PackingOptions
from lightning_pipelite.data.token_ids import first_check
from lightning_pipelite.errors import ConfigurationError


def options(**given: Any) -> PackingOptions:
    return PackingOptions([DatasetConfig("x.txt")], 64, **given)


@pytest.mark.parametrize("key", ["sequence_prefix", "document_prefix", "document_suffix", "mask_tokens"])
@pytest.mark.parametrize("value", [-1, [3, -5], 99999, [99999]], ids=str)
def test_what_is_none(tokenizer_dir: Path, key: str, value: Any) -> None:
    wrong = value if isinstance(value, int) else value[-1]
    size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    with pytest.raises(
        ConfigurationError,
        match=re.escape(
            f"data.{key} contains {wrong}, which is not a token id of {tokenizer_dir}: use ids from 0 to {size - 1}."
        ),
    ):
        first_check(options(**{key: value}), tokenizer_dir)


@pytest.mark.parametrize(
    "given",
    [{}, {"mask_tokens": True}, {"mask_tokens": [0, 5]}, {"document_prefix": "-5"}, {"document_suffix": 3}],
    ids=str,
)
def test_what_may_be_one(tokenizer_dir: Path, given: dict[str, Any]) -> None:
    first_check(options(**given), tokenizer_dir)


def test_what_the_file_does_not_tell_is_left_to_the_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    size = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    first_check(options(mask_tokens=size + 3), tokenizer_dir)  # the tokenizer's class may add it
    first_check(options(mask_tokens=-1), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    first_check(options(mask_tokens=-1), tmp_path)
