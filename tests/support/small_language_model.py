"""A small language model trained on text that every machine with Python has, and LoRAs trained on other such text.

The base learns from the standard library's sources and from pydoc's topics, the LoRAs from the sources of torch.
Weights then have the distribution of a trained model's, which determines how much quantisation loses.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.models import CausalLMLayers


@dataclass(frozen=True)
class Size:
    """The sizes of the model, the texts and the trainings.

    Attributes:
        hidden: Size of the model, like ``layers`` and ``vocabulary``.
        sequence: Tokens in a sequence.
        batch: Sequences in a step.
        base_steps: Steps of the base's training.
        steps: Steps of a LoRA's training.
        evaluated: Number of held-out sequences, on which no LoRA trains.
        characters: Length of each of the two texts.
        lr: Learning rate of a LoRA at the start; it falls to zero at the end, so that the last steps add no noise.
    """

    hidden: int = 1024
    layers: int = 8
    vocabulary: int = 8192
    sequence: int = 512
    batch: int = 16
    base_steps: int = 1500
    steps: int = 200
    evaluated: int = 128
    characters: int = 40_000_000
    lr: float = 5e-4


TINY = Size(64, 2, 320, 64, 8, 60, 16, 8, 60_000, 3e-3)


def base_text(size: Size) -> list[str]:
    """Return documents for the base."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    own = [path for path in sources if "site-packages" not in path.parts]
    return _up_to(size.characters, [*topics.topics.values(), *own])


def other_text(size: Size) -> list[str]:
    """Return documents for the LoRAs."""
    return _up_to(size.characters, sorted(Path(torch.__file__).parent.rglob("*.py")))


def _up_to(characters: int, documents: Sequence[str | Path]) -> list[str]:
    """Return documents in random order, reading files, until they have ``characters`` characters."""
    generator = torch.Generator().manual_seed(0)
    taken: list[str] = []
    for number in torch.randperm(len(documents), generator=generator).tolist():
        document = documents[number]
        try:
            taken.append(document if isinstance(document, str) else document.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):  # Python's own tests include unreadable files
            continue
        characters -= len(taken[-1])
        if characters <= 0:
            break
    return taken


def tokenise(size: Size, base: list[str], other: list[str]) -> list[Tensor]:
    """Return the sequences of both texts, int64 [sequences, tokens + 1], in the base's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size.vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(base[: max(1, len(base) // 4)], trainer)
    made = []
    for text in (base, other):
        flat = torch.tensor([token for each in tokenizer.encode_batch(text) for token in each.ids])
        count = len(flat) // (size.sequence + 1)
        made.append(flat[: count * (size.sequence + 1)].view(count, -1))
    return made


def train_base(size: Size, sequences: Tensor, directory: Path, device: torch.device) -> float:
    """Train the base from scratch, save it in bf16, and return its final loss, the mean of some steps."""
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=-(-size.hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=size.layers, num_attention_heads=max(1, size.hidden // 64),
        num_key_value_heads=max(1, size.hidden // 128), max_position_embeddings=size.sequence,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rising = max(1, size.base_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * step / size.base_steps)),
    )
    losses = []
    for batch in _batches(sequences, size, size.base_steps, seed=0):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = _loss(model(input_ids=batch[:, :-1].to(device), use_cache=False).logits, batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    model.bfloat16().save_pretrained(directory)
    return float(torch.stack(losses[-max(1, size.base_steps // 20) :]).mean())


def train_lora(
    size: Size, sequences: Tensor, directory: Path, device: torch.device, seed: int, **held: bool
) -> tuple[float, float]:
    """Train a LoRA of rank 16, and return the evaluation loss before and after.

    Args:
        size: All sizes.
        sequences: Sequences of the other text; the last ones are for evaluation.
        directory: Directory of the base.
        device: Device to train on.
        seed: Seed of the LoRA's initial values and of the order of the sequences.
        held: Options of CausalLMLayers for the base's weights, which are in bf16 by default.
    """
    layers = CausalLMLayers(directory, adapter=LoRA(16), seed=seed, activation_memory="keep", **held)  # type: ignore[arg-type]
    stage = layers.build_stage(0, len(layers), device)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=size.lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / size.steps)
    positions = torch.arange(size.sequence, device=device).expand(size.batch, -1)

    def loss_of(batch: Tensor) -> Tensor:
        return _loss(stage((batch[:, :-1].to(device).contiguous(), positions)), batch.to(device))

    def evaluate() -> float:
        stage.eval()
        with torch.no_grad():
            parts = sequences[-size.evaluated :].split(size.batch)
            return float(torch.stack([loss_of(part) for part in parts if len(part) == size.batch]).mean())

    first = evaluate()
    stage.train()
    stage.expect_documents(size.batch)
    for batch in _batches(sequences[: -size.evaluated], size, size.steps, seed):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return first, evaluate()


def _batches(sequences: Tensor, size: Size, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield sequences[torch.randint(len(sequences), (size.batch,), generator=generator)]


def _loss(logits: Tensor, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
