"""Tokenizers of the kinds that instruction-tuned models have, trained on the fly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    *sorted(topics.values())[:12],
    *["[INST] Hello [/INST] Hi there"] * 50,
    *["<|im_start|>user\n  indented\n"] * 20,
]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def _byte_level(add_prefix_space: bool = False, trim: bool | None = None, normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if trim is not None:
        bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), bos])
    return backend


def _metaspace(scheme: str, normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    lines = [line for text in TEXTS for line in text.splitlines()]
    backend.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    )
    return backend


def _legacy() -> Tokenizer:
    """Return a tokenizer like the tokenizer.json of Llama 2 and of the first Mistral."""
    backend = _metaspace("always")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return backend


def _unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _lower_case() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "byte level": (_byte_level, {}),
    "byte level, as Llama 3": (lambda: _byte_level(trim=True), {}),
    "byte level, as Qwen": (lambda: _byte_level(trim=False, normalizer=normalizers.NFC()), {}),
    "byte level, prefix": (lambda: _byte_level(add_prefix_space=True), {}),
    "byte level, GPT-2's class": (lambda: _byte_level(trim=True), {"tokenizer_class": "GPT2Tokenizer"}),
    "byte level, GPT-2's class, prefix": (
        lambda: _byte_level(trim=True), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    ),
    "metaspace first": (lambda: _metaspace("first"), {}),
    "metaspace always": (lambda: _metaspace("always"), {}),
    "metaspace never": (lambda: _metaspace("never"), {}),
    "metaspace, normalizer": (lambda: _metaspace("first", normalizers.NFKC()), {}),
    "Llama, legacy": (_legacy, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "Llama, not legacy": (_legacy, {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "Llama, no prefix": (_legacy, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
    "Llama, prefix": (_legacy, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True, "add_bos_token": True}),
    "Llama's file alone": (_legacy, {}),
    "unigram": (_unigram, {}),
    "word pieces": (_lower_case, {}),
}  # fmt: skip


def write_tokenizer(folder: Path, kind: str, template: str) -> Path:
    """Save a tokenizer of a kind with a chat template."""
    make, settings = KINDS[kind]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make(), bos_token="<s>", eos_token="</s>", unk_token="<unk>" if kind[:4] != "byte" else None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder
