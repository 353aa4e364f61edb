"""A tiny causal LM with its own code: its classes, what they import, its tokenizer and the tokenizer's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import write_model

MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

from .own_scale import scaled


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = scaled(outputs.logits)
        return outputs
"""
SCALE = """
from .own_number import NUMBER


def scaled(logits):
    return NUMBER * logits
"""
TOKENIZER = """
from transformers import PythonBackend


class OwnTokenizer(PythonBackend):
    vocab_files_names = {"words": "own_words.txt"}

    def __init__(self, words, **kwargs):
        self.words = open(words).read().split()
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}

    def _tokenize(self, text, **kwargs):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token)

    def _convert_id_to_token(self, index):
        return self.words[index]
"""
FILES = {"own_model.py", "own_scale.py", "own_number.py", "own_tokenizer.py", "own_words.txt"}


def write_own(directory: Path) -> Path:
    """Save the model; nothing in its files names a type that transformers knows."""
    write_model(directory, "llama")
    for name, text in (
        ("own_model.py", MODEL),
        ("own_scale.py", SCALE),
        ("own_number.py", "NUMBER = 0.5\n"),
        ("own_tokenizer.py", TOKENIZER),
        ("own_words.txt", "some few words"),
        ("unnamed.py", "raise RuntimeError\n"),
    ):
        (directory / name).write_text(text)
    change(directory / "config.json", model_type="own", architectures=["OwnForCausalLM"])
    auto_map = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    change(directory / "config.json", auto_map=auto_map)
    tokenizer = {"auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
