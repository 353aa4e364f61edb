"""A tiny fine-tuning job on disk: model, tokenizer, texts, and the options that train it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS = 4


def write_job(folder: Path) -> Path:
    """Write ``model`` (four layers, with its tokenizer) and ``texts`` (twenty files) into a folder."""
    texts = sorted({text.strip()[: 40 + 37 * number] for number, text in enumerate(topics.values())})[:20]
    (folder / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def options(folder: Path, **trainer: Any) -> dict[str, Any]:
    """Return the options of one LoRA step in one CPU process, without logger and checkpoints."""
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            **trainer,
        },
        "model": {
            "model_dir": str(folder / "model"),
            "adapter": {"class_path": "lightning_pipelite.adapters.LoRA", "init_args": {"rank": 2}},
            "dtype": "float32",
        },
        "data": {
            "datasets": [{"dataset_path": str(folder / "texts" / "*.txt")}],
            "sequence_len": 64,
            "cache_dir": str(folder / "cache"),
        },
    }
