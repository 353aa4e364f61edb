"""Samples during training: the text that transformers writes, and no effect on the training."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_pipelite.callbacks import Samples
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.module.greedy import GreedyWriter
from processes import Workers
from sample_jobs import train_with_samples
from tiny_job import write_job

PROMPTS = ["The statement", "A class is"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


def by_transformers(job: Path, adapter: Path) -> list[str]:
    """Return what transformers writes with the merged weights."""
    tokenizer = AutoTokenizer.from_pretrained(job / "model")
    base = AutoModelForCausalLM.from_pretrained(job / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().eval()
    written = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=5)
        written.append(tokenizer.decode(ids[0, given.shape[1] :], skip_special_tokens=True))
    return written


@pytest.mark.parametrize(("stages", "ranks", "virtual"), [(1, 1, 1), (2, 2, 1), (2, 4, 2)])
def test_is_what_transformers_writes(
    workers: Workers, job: Path, tmp_path: Path, stages: int, ranks: int, virtual: int
) -> None:
    losses = workers.run(ranks, train_with_samples, str(job), str(tmp_path / "with"), stages, ranks, PROMPTS, virtual)
    assert len(losses[0]) == 2
    without = workers.run(ranks, train_with_samples, str(job), str(tmp_path / "without"), stages, ranks, [], virtual)
    assert losses == without  # bit for bit
    (log,) = (tmp_path / "with").rglob("events.*")
    events = EventAccumulator(str(log)).Reload()
    shown = [events.Tensors(f"samples/{number}/text_summary") for number in range(len(PROMPTS))]
    assert [[event.step for event in each] for each in shown] == [[1, 2]] * len(PROMPTS)
    texts = [[event.tensor_proto.string_val[0].decode() for event in each] for each in shown]
    # Metrics, too, are logged at the steps of the terminal, which start at 1; Lightning's start at 0.
    for name in ("train/loss", "train/lr", "eval/loss", "epoch"):
        assert sorted({event.step for event in events.Scalars(name)}) == [1, 2], name
    assert {event.value for event in events.Scalars("epoch")} == {0.0}
    expected = by_transformers(job, tmp_path / "with" / "adapter")
    wanted = [f"{prompt}⟶{text}" for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert [each[-1] for each in texts] == ["\n".join(f"    {line}" for line in each.splitlines()) for each in wanted]
    assert texts[0][0] != texts[0][-1]  # training has changed it


@pytest.mark.parametrize("ends", [None, 7, [9, 7]])
def test_ends_where_transformers_ends(job: Path, tmp_path: Path, ends: int | list[int] | None) -> None:
    """Chat models have the end of a turn only in generation_config.json; the tokenizer has the end of a text."""
    shutil.copytree(job / "model", tmp_path, dirs_exist_ok=True)
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    tokens = iter([5, 7, 6, 1, 8])  # the tokenizer's end is 1
    evaluation = SimpleNamespace(by=lambda *_: (next(tokens), 1))
    strategy: Any = SimpleNamespace(batch_to_device=lambda batch: batch, evaluation=evaluation)
    GreedyWriter(tmp_path, (), False, None).write("a", 5, strategy)
    assert list(tokens) == ([8] if ends is None else [6, 1, 8])


@pytest.mark.parametrize(("positions", "written"), [(2, 0), (4, 2), (None, 5)])
def test_ends_where_the_embedded_positions_do(job: Path, positions: int | None, written: int) -> None:
    lengths: list[int] = []

    def next_token(_: Any, batch: dict[str, torch.Tensor], __: str) -> tuple[int, int]:
        lengths.append(int(batch["position_ids"].max()) + 1)
        return 5, 1

    evaluation = SimpleNamespace(by=next_token)
    strategy: Any = SimpleNamespace(batch_to_device=lambda batch: batch, evaluation=evaluation)
    writer = GreedyWriter(job / "model", (), False, positions)
    writer._tokenizer = lambda _: {"input_ids": [7, 8]}
    writer._tokenizer.eos_token_id = 1
    writer._tokenizer.decode = lambda ids, **_: str(len(ids))
    text = writer.write("a", 5, strategy)
    assert len(lengths) == written
    assert max(lengths, default=0) <= (positions or 7)
    assert text == (str(written) if written else "(nothing: the prompt has 2 tokens, the model has 2 positions)")


def test_what_is_refused() -> None:
    for options in ({"prompts": []}, {"prompts": [""]}, {"prompts": ["a"], "max_new_tokens": 0}):
        with pytest.raises(ConfigurationError, match="Samples: "):
            Samples(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Samples: Linear has no method write_text"):
        Samples(["a"]).setup(None, torch.nn.Linear(1, 1), "fit")  # type: ignore[arg-type]
