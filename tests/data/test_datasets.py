"""Several datasets in one training: limits, mixing, weights and separate evaluation sets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.errors import ConfigurationError
from packed_files import BOS, EOS, documents_of, items, write_jsonl
from packing_reference import pack_slowly

MakeData = Callable[..., PackedDataModule]


def test_max_tokens_takes_whole_documents(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    source.max_tokens = 2000
    data = make_data([source], eval_fraction=0)
    data.prepare_data()
    kept = documents_of(items(data.train_dataloader()))
    assert not set(kept) - {encode(text) for text in texts}
    assert 2000 - max(len(encode(text)) for text in texts) < sum(map(len, kept)) <= 2000

    source.max_tokens = 3
    with pytest.raises(ConfigurationError, match=r"max_tokens of .*a\.jsonl is 3, but the first document"):
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
    assert data.summary()[5].endswith(
        "2 bad records skipped (the first: "
        f"{tmp_path / 'b.jsonl'}, line 31: the field 'text' must be a string, not int.)"
    )
    with pytest.raises(ConfigurationError, match=r"b\.jsonl, line 31: the field 'text' must be a string, not int"):
        make_data([first, second], eval_fraction=0.1).prepare_data()


@pytest.mark.parametrize("mix", [False, True])
def test_the_padding_of_each_dataset(tmp_path: Path, make_data: MakeData, encode: Any, mix: bool) -> None:
    """A dataset's padding is that of all sequences that hold any of it; the prefix does not count as padding."""
    texts = [["a" * 90, "b" * 90], ["c" * 50]]
    sources = [write_jsonl(tmp_path / f"{number}.jsonl", each) for number, each in enumerate(texts)]
    data = make_data(sources, eval_fraction=0, mix_datasets=mix)
    data.prepare_data()
    rows = [item["input_ids"] for item in items(data.train_dataloader())]
    for told, each in zip(data.statistics.datasets, texts, strict=True):
        own = {token for text in each for token in encode(text)} - {EOS}
        touched = [row for row in rows if own & set(row)]
        behind = [len(list(itertools.takewhile(EOS.__eq__, reversed(row)))) for row in touched]
        padding = sum(max(0, count - 1) for count in behind)  # the first ends a document
        assert told.sequences == len(touched)
        assert told.padding == pytest.approx(padding / (64 * len(touched)))
    assert 0 < data.statistics.datasets[0].padding < 1


def test_a_dataset_of_which_nothing_is_packed(tmp_path: Path, make_data: MakeData) -> None:
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", [name * 200]) for name in "ab"]
    data = make_data(sources, eval_fraction=0, max_sequences=1, mix_datasets=False)
    data.prepare_data()
    packed, other = sorted(data.statistics.datasets, key=lambda told: -told.sequences)
    assert (packed.documents, packed.sequences, packed.unused_documents) == (1, 1, 0)
    assert (other.documents, other.tokens, other.sequences, other.padding, other.unused_documents) == (0, 0, 0, 0, 1)


def test_evaluation_datasets(tmp_path: Path, make_data: MakeData, texts: list[str], encode: Any) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.txt").write_text(texts[50])
    # Five documents of wiki.jsonl are also in the training set.
    others = [write_jsonl(tmp_path / "wiki.jsonl", texts[45:55]), DatasetConfig(str(tmp_path / "more" / "*.txt"))]
    data = make_data([source], eval_datasets=[*others, others[0]], eval_fraction=0)
    data.prepare_data()
    assert data.eval_names == ["wiki", "more", "wiki-2"]
    train = documents_of(items(data.train_dataloader()))
    wiki, more, again = (documents_of(items(loader)) for loader in data.val_dataloader())
    assert Counter(train) == Counter(map(encode, texts[:45]))
    assert Counter(wiki) == Counter(again) == Counter(map(encode, texts[45:55]))
    assert more == [encode(texts[50])]
    assert [line.split(":")[0] for line in data.summary()[5:8]] == ["eval wiki", "eval more", "eval wiki-2"]
    assert data.statistics.datasets[0].unused_documents == 5
    assert data.statistics.eval.sequences == sum(len(loader.dataset) for loader in data.val_dataloader())

    both = make_data([source], eval_datasets=others[1:], eval_fraction=0.2)
    both.prepare_data()
    assert both.eval_names == ["held_out", "more"]
    held_out, more = (documents_of(items(loader)) for loader in both.val_dataloader())
    train = documents_of(items(both.train_dataloader()))
    assert len(held_out) == 10
    assert Counter(train) + Counter(held_out) == Counter(map(encode, texts[:50]))
    with pytest.raises(ConfigurationError, match=r"Every document in data\.datasets is also in data\.eval_datasets"):
        make_data([source], eval_datasets=[source]).prepare_data()
    copy = write_jsonl(tmp_path / "copy.jsonl", texts[:50])
    with pytest.raises(ConfigurationError, match=r"Every document in data\.datasets is also in data\.eval_datasets"):
        make_data([source], eval_datasets=[copy]).prepare_data()


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
    with pytest.raises(ConfigurationError, match=r"weight of .*0\.jsonl entitles it to \d training tokens, fewer than"):
        shares(1.0, 1e4)
