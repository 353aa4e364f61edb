"""Prefixes and suffixes of documents match the tokenizer's own encoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data.config import DatasetConfig, PackingOptions
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError

OPTIONS = PackingOptions(
    datasets=[DatasetConfig("x.txt")],
    eval_datasets=[],
    sequence_len=64,
    max_sequences=None,
    drop_tails=False,
    mix_datasets=False,
    packing=None,
    sequence_prefix=None,
    document_prefix=None,
    document_suffix=None,
    mask_tokens=None,
    eval_fraction=0.0,
    add_prefix_space=False,
    trust_remote_code=False,
    skip_bad_records=False,
    seed=0,
)


def test_defaults(tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    ours = DocumentTokenizer(tokenizer_dir, OPTIONS)
    assert ours.sequence_prefix == [tokenizer.bos_token_id]
    assert ours.masked_ids == []
    assert ours.padding_id == tokenizer.eos_token_id
    assert ours.encode(["", *texts]) == [
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in ["", *texts]
    ]


def test_tokenizer_without_special_tokens(make_tokenizer: Callable[..., Path]) -> None:
    ours = DocumentTokenizer(make_tokenizer({}), replace(OPTIONS, mask_tokens=True))
    assert (ours.sequence_prefix, ours.masked_ids, ours.padding_id) == ([], [], 0)
    assert ours.encode([""]) == [[]]


@pytest.mark.parametrize(
    ("prefix", "suffix", "text", "before", "after"),
    [
        ("", "", "hello", [], []),
        (5, 6, "hello", [5], [6]),
        (0, 0, "hello", [0], [0]),
        ([5, 7], [6, 6], "hello", [5, 7], [6, 6]),
        ("th", "e </s>", "the hello e </s>", [], []),
        ([], [], "hello", [], []),
    ],
)
def test_document_prefix_and_suffix(
    tokenizer_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    prefix: Any,
    suffix: Any,
    text: str,
    before: list[int],
    after: list[int],
) -> None:
    ours = DocumentTokenizer(tokenizer_dir, replace(OPTIONS, document_prefix=prefix, document_suffix=suffix))
    document = "e hello " if isinstance(prefix, str) and prefix else "hello"
    assert ours.encode([document]) == [before + tokenizer.encode(text, add_special_tokens=False) + after]


def test_text_is_tokenised_across_the_join(tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ours = DocumentTokenizer(tokenizer_dir, replace(OPTIONS, document_prefix="t", document_suffix=""))
    joined, apart = tokenizer.encode("the", add_special_tokens=False), tokenizer.encode("he", add_special_tokens=False)
    assert ours.encode(["he"]) == [joined] != [tokenizer.encode("t", add_special_tokens=False) + apart]


@pytest.mark.parametrize(("value", "text"), [("", ""), ("Once upon", "Once upon"), ("<s> a", "<s> a")])
def test_sequence_prefix_as_text(
    tokenizer_dir: Path, tokenizer: PreTrainedTokenizerFast, value: str, text: str
) -> None:
    ours = DocumentTokenizer(tokenizer_dir, replace(OPTIONS, sequence_prefix=value))
    assert ours.sequence_prefix == (tokenizer.encode(text, add_special_tokens=False) if text else [])


@pytest.mark.parametrize(("value", "ids"), [(True, [0, 1]), (False, []), (0, [0]), (9, [9]), ([9, 3, 9], [3, 9])])
def test_mask_tokens(tokenizer_dir: Path, value: Any, ids: list[int]) -> None:
    assert DocumentTokenizer(tokenizer_dir, replace(OPTIONS, mask_tokens=value)).masked_ids == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sequence_prefix": 100_000},
            r"data\.sequence_prefix contains 100000, which is not a token id of .*: use ids from 0",
        ),
        ({"document_prefix": -1}, r"data\.document_prefix contains -1"),
        ({"document_suffix": [1, 100_000]}, r"data\.document_suffix contains 100000"),
        ({"mask_tokens": [100_000]}, r"data\.mask_tokens contains 100000"),
        ({"sequence_prefix": [1] * 64}, r"data\.sequence_prefix is 64 tokens long, which leaves no room"),
        ({"add_prefix_space": True}, r"data\.add_prefix_space has no effect on the tokenizer"),
    ],
)
def test_options_that_do_not_fit(tokenizer_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DocumentTokenizer(tokenizer_dir, replace(OPTIONS, **options))


def test_add_prefix_space_where_the_tokenizer_knows_it(
    make_tokenizer: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_tokenizer({"bos_token": "<s>", "eos_token": "</s>"})
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "GPT2Tokenizer"))
    without = DocumentTokenizer(folder, OPTIONS).encode(["the name"])
    with_space = DocumentTokenizer(folder, replace(OPTIONS, add_prefix_space=True)).encode(["the name"])
    assert without == DocumentTokenizer(folder, OPTIONS).encode(["the name"])
    assert with_space == DocumentTokenizer(folder, OPTIONS).encode([" the name"]) != without


def test_truncation_and_padding_of_the_file_do_not_count(
    make_tokenizer: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    folder = make_tokenizer({"bos_token": "<s>", "eos_token": "</s>"})
    backend = PreTrainedTokenizerFast.from_pretrained(folder).backend_tokenizer
    backend.enable_truncation(8)
    backend.enable_padding(length=32, pad_token="</s>")
    backend.save(str(folder / "tokenizer.json"))
    ours = DocumentTokenizer(folder, OPTIONS)
    assert ours.encode(texts[:5]) == [[*tokenizer.encode(text, add_special_tokens=False), 0] for text in texts[:5]]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"tokenizer_dir .*none is not a directory: set it to one with a tokenizer"
    ):
        DocumentTokenizer(tmp_path / "none", OPTIONS)
    with pytest.raises(ConfigurationError, match=r"No tokenizer can be loaded from .*: check its files"):
        DocumentTokenizer(tmp_path, OPTIONS)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match="No tokenizer can be loaded from"):
        DocumentTokenizer(tmp_path, OPTIONS)
