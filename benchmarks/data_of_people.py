"""Data files as users have them: the line reported for each, and its first packed sequence, against one by hand.

    python benchmarks/data_of_people.py [--write]

In the sequences, tokens that are not trained on stand in « ». `right`: the ids and labels are those of the conversation
rendered in ChatML by hand. `refused`: the error says what to do.

Exits with 1 if a case is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import tests_support  # noqa: F401
from data_fixtures import real_texts, with_chatml, write_tokenizer
from lightning_pipelite import PackedDataModule
from lightning_pipelite.errors import ConfigurationError
from people_files import Case, is_as_expected
from people_read import CASES as READ
from people_refused import CASES as REFUSED
from report import Report

LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/data_of_people.md")
    arguments = parser.parse_args()
    report = Report("data_of_people", "| file | reported | first sequence | |", "| --- | --- | --- | --- |")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = Path(folder) / "tokenizer"
        with_chatml(write_tokenizer(tokenizer_dir, real_texts(), {"eos_token": "<|im_end|>"}))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
        for number, (name, case) in enumerate([*READ.items(), *REFUSED.items()]):
            said, sequence, is_right = _of(case, Path(folder) / str(number), tokenizer_dir, tokenizer)
            outcome = "WRONG" if not is_right else "right" if sequence else "refused"
            wrong += not is_right
            report.row(f"| {name} | {_cell(said)} | {_cell(sequence)} | {outcome} |")
    report.line(f"{wrong} WRONG" if wrong else f"{len(READ)} right, {len(REFUSED)} refused with what to do")
    if arguments.write:
        report.write()
    sys.exit(wrong > 0)


def _of(case: Case, folder: Path, tokenizer_dir: Path, tokenizer: Any) -> tuple[str, str, bool]:
    folder.mkdir()
    dataset = case.dataset(folder / "data")
    data = PackedDataModule(
        [dataset], LENGTH, str(tokenizer_dir), eval_fraction=0, cache_dir=str(folder / "cache"), **case.module
    )
    try:
        said = data.summary()[0]
    except ConfigurationError as error:
        told = str(error)
        shown = told.replace(f"{folder / 'data'}/", "").replace(str(folder / "data"), "data")
        return shown, "", not case.parts and re.search(case.says, told) is not None
    item = next(iter(data.train_dataloader()))
    is_right = said == f"{dataset.dataset_path}: {case.says}" and is_as_expected(case, item, tokenizer)
    return said.removeprefix(f"{dataset.dataset_path}: "), _shown(item, tokenizer), is_right


def _shown(item: dict[str, Any], tokenizer: Any) -> str:
    labels, ids = item["labels"][0].tolist(), item["input_ids"][0].tolist()
    length = max(place for place, label in enumerate(labels) if label != -100) + 2
    learnt = [place > 0 and labels[place - 1] != -100 for place in range(length)]
    shown = ""
    for is_learnt, run in itertools.groupby(zip(ids, learnt, strict=False), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        shown += text if is_learnt else f"«{text}»"
    return shown


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "\\|")


if __name__ == "__main__":
    main()
