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
from jsonargparse import ArgumentParser
from packed_files import BOS, EOS, documents_of, items, write_jsonl
from packing_reference import label_slowly, pack_slowly
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule, PackedSampler
from lightning_pipelite.errors import ConfigurationError

MakeData = Callable[..., PackedDataModule]


@pytest.fixture
def encode(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], tuple[int, ...]]:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    return lambda text: (*tokenizer.encode(text, add_special_tokens=False), EOS)


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
    """Trains nothing; notes which sequences came in which epoch."""

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
        ConfigurationError, match=r"held out for evaluation \(1 of 2 documents\) fills no sequence of 64 tokens"
    ):
        data.prepare_data()


def test_max_tokens_takes_whole_documents(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.max_tokens = 2000
    data = make_data([source], eval_fraction=0)
    data.prepare_data()
    kept = documents_of(items(data.train_dataloader()))
    assert not set(kept) - {encode(text) for text in texts}
    assert 2000 - max(len(encode(text)) for text in texts) < sum(map(len, kept)) <= 2000

    source.max_tokens = 3
    with pytest.raises(ConfigurationError, match=r"max_tokens of .*a\.jsonl is 3, less than the first document"):
        make_data([source]).prepare_data()


@pytest.mark.parametrize(
    ("limit", "fraction", "held_out"), [(10, 0.3, 3), (2, 0.3, 1), (5, 0.0, 0), (10**6, 0.3, None)]
)
def test_max_sequences_counts_both_sides(
    tmp_path: Path, make_data: MakeData, texts: list[str], limit: int, fraction: float, held_out: int | None
) -> None:
    data = make_data([write_jsonl(tmp_path / "a.jsonl", texts)], eval_fraction=fraction, max_sequences=limit)
    data.prepare_data()
    train, held = data.statistics.train, data.statistics.eval
    if held_out is None:
        assert train.dropped_tokens == held.dropped_tokens == 0
    else:
        assert (train.sequences, held.sequences) == (limit - held_out, held_out)
        assert train.dropped_tokens > 0


def test_mix_datasets(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    halves = [texts[::2], texts[1::2]]
    datasets = [write_jsonl(tmp_path / f"{number}.jsonl", half) for number, half in enumerate(halves)]

    def owners(mix: bool) -> list[set[int]]:
        data = make_data(datasets, eval_fraction=0, mix_datasets=mix, isolate_documents=True)
        data.prepare_data()
        home = {encode(text): number for number, half in enumerate(halves) for text in half}
        sequences = items(data.train_dataloader())
        order = [list(document) for document in documents_of(sequences)]
        groups = [order] if mix else [[d for d in order if home[tuple(d)] == n] for n in (0, 1)]
        expected = pack_slowly(groups, [BOS], 64, False, None, EOS)
        assert [item["input_ids"] for item in sequences] == [[slot.token for slot in s] for s in expected]
        names = [home[tuple(document)] for group in groups for document in group]
        flat = [(g, d) for g, group in enumerate(groups) for d in range(len(group))]
        home_of = dict(zip(flat, names, strict=True))
        return [{home_of[slot.owner] for slot in s if slot.owner not in ("prefix", "padding")} for s in expected]

    assert all(len(found) == 1 for found in owners(False))
    assert any(len(found) == 2 for found in owners(True))


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
    lines = data.summary()
    assert lines[0] == (
        f"train: {train.documents} documents, {train.tokens:,} tokens in 10 sequences of 64 "
        f"({train.padding:.1%} padding), {train.dropped_tokens:,} tokens dropped"
    )
    assert lines[1].startswith(f"eval: {held_out.documents} documents, {held_out.tokens:,} tokens in 2 sequences of 64")
    used = train.documents + held_out.documents
    assert re.fullmatch(
        rf"dataset .*a\.jsonl: {used} documents, {train.tokens + held_out.tokens:,} tokens in 12 sequences "
        rf"\(.*% padding\), {60 - used} documents not used",
        lines[2],
    )

    data = make_data([write_jsonl(tmp_path / "b.jsonl", ["one"])], drop_tails=True)
    assert data.summary()[1] == "eval: none (it takes two different documents to hold one out)"
    with pytest.raises(ConfigurationError, match="The training set has 0 sequences"):
        data.check(1, 1)
    data = make_data([write_jsonl(tmp_path / "b.jsonl", ["one"])], eval_fraction=0)
    assert data.summary()[1] == "eval: none (eval_fraction is 0)"


def test_each_dataset_is_told(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", texts[:30]), write_jsonl(tmp_path / "b.jsonl", texts[30:])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": 7}\n{"text": "x"\n')
    data = make_data([first, second], skip_bad_records=True, eval_fraction=0.1)
    data.prepare_data()
    one, two = data.statistics.datasets
    for told, part in ((one, texts[:30]), (two, texts[30:])):
        assert (told.documents, told.unused_documents) == (30, 0)
        assert told.tokens == sum(len(encode(text)) for text in part)
    whole = data.statistics
    assert one.sequences + two.sequences == whole.train.sequences + whole.eval.sequences
    assert (one.skipped, two.skipped) == (0, 2)
    assert data.summary()[3].endswith(
        "2 bad records skipped (the first: "
        f"{tmp_path / 'b.jsonl'}, line 31: the field 'text' is int, not text; give it a string.)"
    )
    with pytest.raises(ConfigurationError, match=r"b\.jsonl, line 31: the field 'text' is int"):
        make_data([first, second], eval_fraction=0.1).prepare_data()


def test_evaluation_datasets(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.txt").write_text(texts[50])
    # One of its documents is a training document, too.
    others = [write_jsonl(tmp_path / "wiki.jsonl", texts[45:55]), DatasetConfig(str(tmp_path / "more" / "*.txt"))]
    data = make_data([source], eval_datasets=[*others, others[0]], eval_fraction=0)
    data.prepare_data()
    assert data.eval_names == ["wiki", "more", "wiki-2"]
    train = documents_of(items(data.train_dataloader()))
    wiki, more, again = (documents_of(items(loader)) for loader in data.val_dataloader())
    assert Counter(train) == Counter(map(encode, texts[:45]))
    assert Counter(wiki) == Counter(again) == Counter(map(encode, texts[45:55]))
    assert more == [encode(texts[50])]
    assert [line.split(":")[0] for line in data.summary()[1:4]] == ["eval wiki", "eval more", "eval wiki-2"]
    assert data.statistics.datasets[0].unused_documents == 5
    assert data.statistics.eval.sequences == sum(len(loader.dataset) for loader in data.val_dataloader())

    both = make_data([source], eval_datasets=others[1:], eval_fraction=0.2)
    both.prepare_data()
    assert both.eval_names == ["held_out", "more"]
    held_out, more = (documents_of(items(loader)) for loader in both.val_dataloader())
    train = documents_of(items(both.train_dataloader()))
    assert len(held_out) == 10
    assert Counter(train) + Counter(held_out) == Counter(map(encode, texts[:50]))
    with pytest.raises(ConfigurationError, match=r"Every document of data\.datasets is in data\.eval_datasets, too"):
        make_data([source], eval_datasets=[source]).prepare_data()


def test_weights(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    home = {encode(text): number % 2 for number, text in enumerate(texts)}
    datasets = [write_jsonl(tmp_path / f"{number}.jsonl", texts[number::2]) for number in (0, 1)]
    longest = max(map(len, home))

    def shares(*weights: float) -> list[int]:
        for dataset, weight in zip(datasets, weights, strict=True):
            dataset.weight = weight
        data = make_data(datasets, eval_fraction=0, mix_datasets=True)
        data.prepare_data()
        kept = documents_of(items(data.train_dataloader()))
        assert len(kept) == len(set(kept))
        return [sum(len(document) for document in kept if home[document] == number) for number in (0, 1)]

    whole = [sum(len(document) for document in home if home[document] == number) for number in (0, 1)]
    one, two = shares(1.0, 4.0)
    assert two == whole[1]
    assert two / 4 - longest < one <= two / 4
    one, two = shares(8.0, 1.0)
    assert one == whole[0]
    assert one / 8 - longest < two <= one / 8
    with pytest.raises(ConfigurationError, match=r"0\.jsonl gets \d training tokens by its weight, less than"):
        shares(1.0, 1e4)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": []}, r"data\.datasets is empty"),
        ({"datasets": [DatasetConfig("x.txt", max_tokens=0)]}, r"max_tokens of x\.txt is 0"),
        ({"sequence_len": 100}, r"data\.sequence_len is 100: give a positive multiple of 64"),
        ({"sequence_len": 0}, r"data\.sequence_len is 0"),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction is 1\.0"),
        ({"eval_fraction": -0.1}, r"data\.eval_fraction is -0\.1"),
        ({"max_sequences": 1}, r"data\.max_sequences is 1: training needs a sequence, and so does evaluation"),
        ({"max_sequences": 0, "eval_fraction": 0}, r"data\.max_sequences is 0"),
        ({"eval_gradient_accumulation_steps": 0}, r"data\.eval_gradient_accumulation_steps is 0"),
        ({"seed": -1}, r"data\.seed is -1"),
        ({"packing": "tight"}, r"data\.packing is tight: give concatenate, best_fit or null"),
        ({"packing": "best_fit", "drop_tails": True}, r"data\.drop_tails cuts documents, which best-fit packing never"),
        ({"datasets": [DatasetConfig("x.txt", control_class=2)]}, r"control_class of x\.txt is 2: give -1, 0 or 1"),
        ({"datasets": [DatasetConfig("x.txt", weight=0.0)]}, r"weight of x\.txt is 0\.0: give a positive number"),
        ({"datasets": [DatasetConfig("x.txt", weight=1.0), DatasetConfig("y.txt")]}, r"y\.txt has no weight"),
        ({"eval_datasets": [DatasetConfig("y.txt", weight=1.0)]}, r"y\.txt of data\.eval_datasets has a weight"),
        ({"eval_datasets": [DatasetConfig("y.txt", max_tokens=0)]}, r"max_tokens of y\.txt is 0"),
    ],
)
def test_options_out_of_range(make_data: MakeData, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_data(**{"datasets": [DatasetConfig("x.txt")], **options})


def test_errors_when_files_are_read(tmp_path: Path, make_data: MakeData) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer_dir is not set"):
        make_data([source], tokenizer_dir=None).prepare_data()
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer_dir .*gone is no directory"):
        make_data([source], tokenizer_dir=str(tmp_path / "gone")).prepare_data()
    with pytest.raises(ConfigurationError, match=r"dataset_path gone\.txt matches no file"):
        make_data([DatasetConfig("gone.txt")]).prepare_data()
    with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 1: no field 'body'"):
        make_data([DatasetConfig(source.dataset_path, text_field="body")]).prepare_data()
    empty = write_jsonl(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(ConfigurationError, match=r"b\.jsonl holds no document with a token"):
        make_data([source, empty], document_suffix="").prepare_data()


YAML = """
datasets:
  - dataset_path: {path}
    max_tokens: 5000
  - dataset_path: {path}
    text_field: text
sequence_len: 128
tokenizer_dir: {tokenizer}
sequence_prefix: [1, 2]
document_prefix: ""
document_suffix: 7
mask_tokens: {mask}
max_sequences: 50
cache_dir: {cache}
"""


@pytest.mark.parametrize(
    ("mask", "expected"), [("true", [0, 1]), ("3", [3]), ("1", [1]), ("[3, 4]", [3, 4]), ("null", [])]
)
def test_from_yaml(tmp_path: Path, tokenizer_dir: Path, texts: list[str], mask: str, expected: list[int]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    parser = ArgumentParser()
    parser.add_class_arguments(PackedDataModule, "data")
    (tmp_path / "data.yaml").write_text(
        YAML.format(path=source.dataset_path, tokenizer=tokenizer_dir, mask=mask, cache=tmp_path / "cache")
    )
    config = parser.parse_args([f"--data={tmp_path / 'data.yaml'}"])
    data = parser.instantiate_classes(config).data
    data.prepare_data()
    [meta] = (tmp_path / "cache").glob("*/meta.json")
    assert json.loads(meta.read_text())["masked_ids"] == expected
    first = items(data.train_dataloader())[0]["input_ids"]
    assert first[:2] == [1, 2]
    assert 7 in first
    assert len(first) == 128
    assert "BOS if it has one" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("<s>", "<s>"), ("[1, 2]", [1, 2]), ("null", None), ("", "")])
def test_prefix_on_the_command_line(text: str, value: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PackedDataModule, "data")
    arguments = ['--data.datasets=[{"dataset_path": "a.txt"}]', "--data.sequence_len=64"]
    config = parser.parse_args([*arguments, f"--data.sequence_prefix={text}"])
    assert config.data.sequence_prefix == value
