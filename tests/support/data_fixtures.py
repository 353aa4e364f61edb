"""A small byte-level tokenizer and real text, built on the fly. Functions import what they need, to spare torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import pytest

from chat_templates import CHATML
from packed_files import BOS, EOS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lightning_pipelite.data import PackedDataModule


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return real_texts()


def real_texts() -> list[str]:
    """Return sixty different real texts of different lengths."""
    return sorted({text.strip()[: 40 + 37 * number] for number, text in enumerate(topics.values())})[:60]


@pytest.fixture(scope="session")
def make_tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda specials: write_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts, specials)


def write_tokenizer(folder: Path, texts: list[str], specials: dict[str, str]) -> Path:
    """Train a tokenizer of 384 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=sorted(specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(make_tokenizer: Callable[..., Path]) -> Path:
    return make_tokenizer({"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


@pytest.fixture
def encode(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], tuple[int, ...]]:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    return lambda text: (*tokenizer.encode(text, add_special_tokens=False), EOS)


@pytest.fixture
def make_data(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., PackedDataModule]:
    """Make a data module with short sequences and a cache of its own."""
    from lightning_pipelite.data import PackedDataModule

    def make(datasets: list[Any], **options: Any) -> PackedDataModule:
        options = {
            "sequence_len": 64,
            "tokenizer_dir": str(tokenizer_dir),
            "cache_dir": str(tmp_path / "cache"),
            **options,
        }
        return PackedDataModule(datasets, **options)

    return make


@pytest.fixture(scope="module")
def chat_dir(make_tokenizer: Callable[..., Path]) -> Path:
    """A tokenizer with ChatML."""
    return with_chatml(make_tokenizer({"eos_token": "<|im_end|>"}))


def with_chatml(folder: Path) -> Path:
    """Add the rest of ChatML to a tokenizer whose EOS ends a turn."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder
