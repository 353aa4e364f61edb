"""From files on disk to micro-batches, against references that share no code with the package."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule, PackedSampler
from lightning_pipelite.errors import ConfigurationError
from packed_files import BOS, EOS, documents_of, items, write_jsonl
from packing_reference import label_slowly, pack_slowly

MakeData = Callable[..., PackedDataModule]


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("mask", [None, True])
def test_stream_is_what_the_rules_give(
    tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any, isolate: bool, mask: bool | None
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    data = make_data([source], eval_fraction=0.2, isolate_documents=isolate, mask_tokens=mask)
    data.prepare_data()
    train, held_out = items(data.train_dataloader()), items(data.val_dataloader())

    seen: list[tuple[int, ...]] = []
    for side, statistics in ((train, data.statistics.train), (held_out, data.statistics.eval)):
        order = documents_of(side)
        seen += order
        expected = pack_slowly([[list(document) for document in order]], [BOS], 64, False, None, EOS)
        assert len(side) == len(expected) == statistics.sequences
        for item, sequence in zip(side, expected, strict=True):
            labelled = label_slowly(sequence, isolate, {BOS, EOS} if mask else set())
            assert item == labelled._asdict()
        assert statistics.documents == len(order)
        assert statistics.tokens == sum(map(len, order))
        padding = sum(slot.owner == "padding" for sequence in expected for slot in sequence)
        assert statistics.padding == pytest.approx(padding / (64 * len(expected)))
        assert statistics.dropped_tokens == 0

    assert Counter(seen) == Counter(map(encode, texts))
    assert seen != [encode(text) for text in texts]  # shuffled
    assert data.statistics.eval.documents == 12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(st.lists(st.text("ab cé", max_size=150), min_size=1, max_size=12), min_size=1, max_size=3),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    mix=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_document_once_and_on_one_side(
    tmp_path: Path, make_data: MakeData, encode: Any, sources: Any, fraction: float, mix: bool, seed: int
) -> None:
    datasets = [write_jsonl(tmp_path / f"{number}.jsonl", texts) for number, texts in enumerate(sources)]
    data = make_data(datasets, eval_fraction=fraction, mix_datasets=mix, seed=seed)
    data.prepare_data()
    train, held_out = documents_of(items(data.train_dataloader())), documents_of(items(data.val_dataloader()))
    wanted = [encode(text) for texts in sources for text in texts if text]  # documents_of cannot tell "" from padding
    assert Counter(train + held_out) == Counter(wanted)
    assert not set(train) & set(held_out)
    everything = [text for texts in sources for text in texts]
    if fraction and len(set(everything)) > 1:
        assert data.statistics.eval.documents >= 1
        assert data.statistics.train.documents >= 1
    else:
        assert data.val_dataloader() == []
    assert data.statistics.train.documents + data.statistics.eval.documents == len(everything)


def test_packed_loss_is_that_of_each_document_alone(tmp_path: Path, make_data: MakeData, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text[:40] for text in texts[:12]])
    data = make_data([source], sequence_len=512, eval_fraction=0, sequence_prefix="", document_prefix=BOS)
    data.prepare_data()
    batches = list(data.train_dataloader())
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    cross_entropy = torch.nn.CrossEntropyLoss(reduction="sum")
    packed, alone, documents = 0.0, 0.0, []
    with torch.no_grad():
        for batch in batches:
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            packed += cross_entropy(logits[0], batch["labels"][0]).item()
            stream = batch["input_ids"][0].tolist()
            documents += re.findall(rf"{BOS}(?:,\d+)*?,{EOS}(?=,|$)", ",".join(map(str, stream)))
        for document in documents:
            ids = torch.tensor([[int(token) for token in document.split(",")]])
            alone += model(ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
    assert len(documents) == 12
    assert packed == pytest.approx(alone, rel=1e-5)


def test_batches_and_fill(tmp_path: Path, make_data: MakeData, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:30])

    def shares(replicas: int, kind: str) -> list[list[dict[str, torch.Tensor]]]:
        found = []
        for rank in range(replicas):
            data = make_data([source], eval_fraction=0.3, eval_gradient_accumulation_steps=4)
            kwargs = {"num_replicas": replicas, "rank": rank}
            data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=kwargs))
            data.setup("fit")
            loader = getattr(data, f"{kind}_dataloader")()
            assert isinstance(loader.sampler, PackedSampler)
            found.append(list(loader))
            assert len(loader) == len(found[-1])
        return found

    for kind in ("train", "val"):
        whole = [batch["input_ids"] for batch in shares(1, kind)[0] if (batch["labels"] != -100).any()]
        dealt = shares(3, kind)
        assert len({len(share) for share in dealt}) == 1
        if kind == "val":
            assert len(dealt[0]) % 4 == 0
        for number, expected in enumerate(whole):
            assert torch.equal(dealt[number % 3][number // 3]["input_ids"], expected)
        fill = [dealt[number % 3][number // 3] for number in range(len(whole), 3 * len(dealt[0]))]
        for batch in [*fill, *(batch for share in dealt for batch in share)]:
            assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict.fromkeys(
                ("input_ids", "labels", "position_ids", "control_classes"), ((1, 64), torch.int64)
            )
        assert all((batch["labels"] == -100).all() for batch in fill)


class Recorder(L.LightningModule):
    """Trains nothing; records the sequences of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_order: dict[int, list[tuple[int, ...]]] = {}
        self.eval_order: list[tuple[int, ...]] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.train_order.setdefault(self.current_epoch, []).append(tuple(batch["input_ids"][0].tolist()))
        return self.weight * 0

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.eval_order.append(tuple(batch["input_ids"][0].tolist()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_in_the_trainer(tmp_path: Path, make_data: MakeData, texts: list[str], fraction: float) -> None:
    data = make_data([write_jsonl(tmp_path / "a.jsonl", texts[:12])], eval_fraction=fraction)
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    first, second = module.train_order[0], module.train_order[1]
    assert len(first) == data.statistics.train.sequences
    assert Counter(first) == Counter(second)
    assert first != second
    assert len(module.eval_order) == 2 * data.statistics.eval.sequences
    assert bool(module.eval_order) == bool(fraction)


def test_drop_tails_begins_each_sequence_afresh(
    tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any
) -> None:
    data = make_data([write_jsonl(tmp_path / "a.jsonl", texts)], eval_fraction=0, drop_tails=True)
    data.prepare_data()
    starts = {encode(text)[:63] for text in texts}
    sequences = items(data.train_dataloader())
    heads = [tuple(item["input_ids"][1:]) for item in sequences]
    assert all(any(head[: len(start)] == start for start in starts) for head in heads)
    statistics = data.statistics.train
    assert statistics.padding == 0
    assert statistics.tokens == 63 * len(sequences)
    assert statistics.dropped_tokens == sum(len(encode(text)) for text in texts) - statistics.tokens > 0


def test_drop_tails_that_leaves_no_evaluation(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data([write_jsonl(tmp_path / "a.jsonl", ["short", "brief"])], drop_tails=True)
    with pytest.raises(
        ConfigurationError, match=r"held out for evaluation \(1 of 2\) do not fill a sequence of 64 tokens"
    ):
        data.prepare_data()


def test_seed_decides(tmp_path: Path, make_data: MakeData, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)

    def sides(seed: int, cache: str) -> tuple[Any, Any]:
        data = make_data([source], eval_fraction=0.2, seed=seed, cache_dir=str(tmp_path / cache))
        data.prepare_data()
        return items(data.train_dataloader()), items(data.val_dataloader())

    assert sides(3, "one") == sides(3, "two")
    assert sides(3, "one")[0] != sides(4, "one")[0]
    assert set(documents_of(sides(3, "one")[1])) != set(documents_of(sides(4, "one")[1]))


def test_check_and_summary(tmp_path: Path, make_data: MakeData, texts: list[str]) -> None:
    data = make_data([write_jsonl(tmp_path / "a.jsonl", texts)], max_sequences=12, eval_fraction=0.2)
    data.prepare_data()
    train, held_out = data.statistics.train, data.statistics.eval
    data.check(2, 5)
    message = (
        "The training set has 10 sequences of 64 tokens, but one step takes 12 (3 micro-batches on each of 4 replicas)"
    )
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        data.check(4, 3)
    found, *lines = data.summary()
    assert found == f"{tmp_path / 'a.jsonl'}: text: text; loss on everything"
    assert lines[0] == (
        f"train: {train.documents} documents, {train.tokens:,} tokens in 10 sequences of 64 "
        f"({train.padding:.1%} padding), {train.dropped_tokens:,} tokens dropped"
    )
    documents = "1 document" if held_out.documents == 1 else f"{held_out.documents} documents"
    assert lines[1].startswith(f"eval: {documents}, {held_out.tokens:,} tokens in 2 sequences of 64")
    used = train.documents + held_out.documents
    assert re.fullmatch(
        rf"dataset .*a\.jsonl: {used} documents, {train.tokens + held_out.tokens:,} tokens in 12 sequences "
        rf"\(.*% padding\), {60 - used} documents not used",
        lines[2],
    )

    data = make_data([write_jsonl(tmp_path / "c.jsonl", ["one two three", "three two one"])])
    held_out = data.summary()[2]
    assert re.search(r"; [45]\d% of all tokens, because whole documents are held out: split long ones", held_out)
    assert "of all tokens" not in lines[1]

    data = make_data([write_jsonl(tmp_path / "b.jsonl", ["one"])], drop_tails=True)
    assert data.summary()[2] == "eval: none (holding one out takes at least two different documents)"
    with pytest.raises(ConfigurationError, match="The training set has 0 sequences"):
        data.check(1, 1)
    data = make_data([write_jsonl(tmp_path / "b.jsonl", ["one"])], eval_fraction=0)
    assert data.summary()[2] == "eval: none (eval_fraction is 0)"


def test_conversations_from_disk_to_labels(tmp_path: Path, make_tokenizer: Any, make_data: MakeData) -> None:
    folder = make_tokenizer({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    talks = [
        [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": "a" * (n % 9 + 1)}]
        for n in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"talk": talk}) + "\n" for talk in talks))
    source = DatasetConfig(str(tmp_path / "talks.jsonl"), messages_field="talk", control_class=-1)
    data = make_data([source], tokenizer_dir=str(folder), eval_fraction=0)
    data.prepare_data()
    found = Counter()
    for item in items(data.train_dataloader()):
        starts = [t for t, position in enumerate(item["position_ids"]) if position == 0]
        for begin, end in zip(starts, [*starts[1:], 64], strict=True):
            text = tokenizer.decode(item["input_ids"][begin:end])
            labels = [label for label in item["labels"][begin:end] if label != -100]
            assert item["control_classes"][begin:end] == [-int(label != -100) for label in item["labels"][begin:end]]
            if labels:
                found[text, tokenizer.decode(labels)] += 1
            else:
                assert set(text.split("</s>")) == {""}  # padding
    assert found == Counter(
        (f"u: {user['content']}</s>a: {reply['content']}</s>", f"a: {reply['content']}</s>") for user, reply in talks
    )
    assert 0 < data.statistics.train.padding < 0.5


def test_a_test_set_is_not_held_out() -> None:
    with pytest.raises(ConfigurationError, match="has no test set"):
        PackedDataModule.test_dataloader(SimpleNamespace())  # type: ignore[arg-type]
