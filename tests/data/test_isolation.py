"""Documents that are packed and isolated train as each of them does alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_jobs import packed_step
from lightning_pipelite.data import DatasetConfig
from packed_files import BOS, EOS
from processes import Workers

LIMIT = 1e-5


@pytest.fixture(scope="module")
def documents(texts: list[str]) -> list[str]:
    return [text[: 20 + 9 * number] for number, text in enumerate(texts[:24])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Path:
    made = tmp_path_factory.mktemp("isolation")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.15,  # large enough to reveal attention between documents
    )
    LlamaForCausalLM(config).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    (made / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over all tokens and its gradients, computed document by document, without the package."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for text in documents:
        ids = torch.tensor([[BOS, *tokenizer.encode(text, add_special_tokens=False), EOS]])
        logits = model(ids, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    (total / count).backward()
    gradients = {f"causal_lm.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1000 * LIMIT
    return float(total.detach() / count), gradients


def differences(workers: Workers, folder: Path, alone: Any, stages: int, **options: Any) -> tuple[float, float]:
    data = {
        "datasets": [DatasetConfig(str(folder / "a.jsonl"))],
        "sequence_len": 256,
        "eval_fraction": 0,
        "packing": "best_fit",
        "sequence_prefix": "",
        "document_prefix": BOS,
        "tokenizer_dir": str(folder / "model"),
        "cache_dir": str(folder / "cache"),
        **options,
    }
    ranks = workers.run(stages, packed_step, str(folder / "model"), data, stages)
    found = {name: gradient for _, gradients in ranks for name, gradient in gradients.items()}
    assert found.keys() == alone[1].keys()
    return (
        max(abs(loss - alone[0]) for loss, _ in ranks),
        max(float((found[name] - gradient).abs().max()) for name, gradient in alone[1].items()),
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_packed_equals_alone(workers: Workers, folder: Path, alone: Any, stages: int) -> None:
    loss, gradient = differences(workers, folder, alone, stages)
    print(f"{stages} stages: largest difference of the loss {loss:.1e}, of a gradient {gradient:.1e}")
    assert loss <= LIMIT
    assert gradient <= LIMIT


def test_without_isolation_it_does_not(workers: Workers, folder: Path, alone: Any) -> None:
    loss, gradient = differences(workers, folder, alone, 1, isolate_documents=False)
    assert loss > 100 * LIMIT
    assert gradient > 100 * LIMIT
