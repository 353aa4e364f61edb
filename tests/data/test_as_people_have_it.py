"""Files as people have them: what is found, the line that says it, and the labels beside a rendering by hand."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_sources import save_dataset
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.data.templates import TEMPLATES
from lightning_pipelite.errors import ConfigurationError
from people_files import (
    ALPACA,
    ANSWER,
    MESSAGES,
    PAIR,
    QA,
    QUESTION,
    TALKS,
    TOLD,
    TWICE,
    TWO,
    Part,
    Write,
    arrow,
    chat,
    expected,
    lines,
    parquet,
    put,
    several,
    shared,
)


@dataclass
class Case:
    write: Write
    says: str
    """The line, without the path."""
    parts: list[Part]
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)


CASES = {
    "messages": Case(lines("a.jsonl", {"messages": MESSAGES}), f"messages: messages; {TALKS}", PAIR),
    "messages in JSON": Case(
        lambda folder: put(folder / "a.json", json.dumps([{"messages": MESSAGES}], indent=1)),
        f"messages: messages; {TALKS}",
        PAIR,
    ),
    "messages in parquet": Case(parquet("a.parquet", {"messages": MESSAGES}), f"messages: messages; {TALKS}", PAIR),
    "messages as text in parquet": Case(
        parquet("a.parquet", {"messages": json.dumps(MESSAGES)}), f"messages: messages; {TALKS}", PAIR
    ),
    "messages in Arrow, called conversation": Case(
        arrow("a.arrow", {"conversation": MESSAGES}), f"messages: conversation; {TALKS}", PAIR
    ),
    "a reply of weight 0": Case(
        lines("a.jsonl", {"messages": [MESSAGES[0], {**MESSAGES[1], "content": "No", "weight": 0}, *MESSAGES]}),
        f"messages: messages; {TALKS}",
        chat(("user", QUESTION), ("assistant", "No"), ("user", QUESTION), ("assistant", ANSWER), learnt=(3,)),
    ),
    "the last turn only": Case(
        lines("a.jsonl", shared(TWICE)),
        f"ShareGPT: conversations; {TALKS} of the last turn",
        chat(("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION), ("assistant", ANSWER), learnt=(3,)),
        options={"last_turn_only": True},
    ),
    "ShareGPT": Case(lines("a.jsonl", shared(TWICE)), f"ShareGPT: conversations; {TALKS}", TWO),
    "ShareGPT in parquet, with a system column": Case(
        parquet("a.parquet", shared(TWICE, system="Be brief.")),
        f"ShareGPT: conversations, system; {TALKS}",
        [*chat(("system", "Be brief.")), *TWO],
    ),
    "alpaca": Case(lines("a.jsonl", ALPACA), "alpaca: instruction, input, output; loss on output", TOLD),
    "alpaca without input": Case(
        lines("a.jsonl", {**ALPACA, "instruction": QUESTION, "input": ""}),
        "alpaca: instruction, output; loss on output",
        PAIR,
    ),
    "alpaca in CSV": Case(
        lambda folder: put(folder / "a.csv", f'instruction,input,output\n"Tell me.",{QUESTION},{ANSWER}\n'),
        "alpaca: instruction, input, output; loss on output",
        TOLD,
    ),
    "alpaca in CSV of a spreadsheet": Case(
        lambda folder: put(
            folder / "a.csv", f"\ufeffinstruction;input;output\r\nTell me.;{QUESTION};{ANSWER}\r\n".encode()
        ),
        "alpaca: instruction, input, output; loss on output",
        TOLD,
    ),
    "alpaca with history and system": Case(
        lines("a.jsonl", {"instruction": QUESTION, "output": ANSWER, "history": [["Hi", "Hello"]], "system": "Be."}),
        "alpaca: system, history, instruction, output; loss on output",
        chat(
            ("system", "Be."),
            ("user", "Hi"),
            ("assistant", "Hello"),
            ("user", QUESTION),
            ("assistant", ANSWER),
            learnt=(4,),
        ),
    ),
    "Dolly": Case(
        lines("a.jsonl", {"instruction": "Tell me.", "context": QUESTION, "response": ANSWER, "category": "x"}),
        "alpaca: instruction, context, response; loss on response",
        TOLD,
    ),
    "prompt and completion": Case(
        lines("a.jsonl", {"prompt": QUESTION, "completion": ANSWER}),
        "prompt/completion: prompt, completion; loss on completion",
        PAIR,
    ),
    "prompt and completion as TRL's messages": Case(
        lines(
            "a.jsonl",
            {
                "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, MESSAGES[0]],
                "completion": MESSAGES[1:],
            },
        ),
        "prompt/completion: prompt, completion; loss on completion",
        chat(("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION), ("assistant", ANSWER), learnt=(3,)),
    ),
    "prompt and response": Case(
        lines("a.jsonl.gz", {})
        and (
            lambda folder: put(
                folder / "a.jsonl.gz", gzip.compress(json.dumps({"prompt": QUESTION, "response": ANSWER}).encode())
            )
        ),
        "prompt/response: prompt, response; loss on response",
        PAIR,
    ),
    "question and answer": Case(
        parquet("a.parquet", {**QA, "id": 1}), "question/answer: question, answer; loss on answer", PAIR
    ),
    "fields that are named": Case(
        lines("a.jsonl", {"Frage": QUESTION, "Antwort": ANSWER, "Thema": "x"}),
        "question and answer: Frage, Antwort; loss on Antwort",
        PAIR,
        options={"question_field": "Frage", "answer_field": "Antwort"},
    ),
    "a format that is named": Case(
        lines("a.jsonl", {**QA, "text": "x"}),
        "question/answer: question, answer; loss on answer",
        PAIR,
        options={"format": "question_answer"},
    ),
    "a template that is given": Case(
        lines("a.jsonl", QA),
        "question/answer: question, answer; loss on answer",
        [(f"### Instruction:\n{QUESTION}\n\n### Response:\n", False), (f"{ANSWER}<|im_end|>", True)],
        module={"chat_template": "alpaca"},
    ),
    "text": Case(lines("a.jsonl", {"text": "Once."}), "text: text; loss on everything", [("Once.<|im_end|>", True)]),
    "content": Case(
        lines("a.jsonl", {"content": "Once."}), "text: content; loss on everything", [("Once.<|im_end|>", True)]
    ),
    "text in CSV": Case(
        lambda folder: put(folder / "a.csv", 'text,url\n"Once,\n""twice"".",x\n'),
        "text: text; loss on everything",
        [('Once,\n"twice".<|im_end|>', True)],
    ),
    "Markdown": Case(
        several(lambda folder: put(folder / "a.md", "# One"), lambda folder: put(folder / "README.md", "no")),
        "text: text; loss on everything",
        [("# One<|im_end|>", True)],
        path=".",
    ),
    "a downloaded dataset": Case(
        several(
            parquet("data/train-00000-of-00001.parquet", QA),
            parquet("data/test-00000-of-00001.parquet", {**QA, "question": "secret"}),
            lambda folder: put(folder / "README.md", "about"),
        ),
        "question/answer: question, answer; loss on answer",
        PAIR,
        path=".",
    ),
    "another split of it": Case(
        several(lines("train.jsonl", {**QA, "question": "other"}), lines("validation.jsonl", QA)),
        "question/answer: question, answer; loss on answer",
        PAIR,
        path=".",
        options={"split": "validation"},
    ),
    "a saved DatasetDict": Case(
        several(
            lambda folder: save_dataset(folder / "train", ["Once.", ""]),
            lambda folder: save_dataset(folder / "test", ["secret", ""]),
            lambda folder: put(folder / "dataset_dict.json", '{"splits": ["train", "test"]}'),
        ),
        "text: text; loss on everything",
        [("Once.<|im_end|>", True)],
        path=".",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path, name: str) -> None:
    case, folder = CASES[name], tmp_path / "data_of_people"
    folder.mkdir()
    case.write(folder)
    only = next(folder.iterdir()).name
    dataset = DatasetConfig(str(folder / (case.path or only)), **case.options)
    data = make_data([dataset], sequence_len=256, tokenizer_dir=str(chat_dir), eval_fraction=0, **case.module)
    assert data.summary()[0] == f"{dataset.dataset_path}: {case.says}"
    assert len(data.train_dataloader().dataset) == 1
    (item,) = (item for item in data.train_dataloader())
    ids, labels = expected(case.parts, PreTrainedTokenizerFast.from_pretrained(chat_dir))
    assert item["input_ids"][0, : len(ids)].tolist() == ids
    assert item["labels"][0].tolist() == [*labels[1:], *[-100] * (256 - len(ids) + 1)]


def test_files_of_other_splits_are_told(
    make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path
) -> None:
    several(lines("d/train.jsonl", QA), lines("d/test.jsonl", {**QA, "question": "x"}))(tmp_path)
    both = [DatasetConfig(str(tmp_path / "d"))]
    data = make_data(both, eval_datasets=both, sequence_len=128, tokenizer_dir=str(chat_dir), eval_fraction=0)
    told = [line for line in data.summary() if line.startswith("dataset")]
    assert [re.search("files not read: .*", line)[0] for line in told] == [  # type: ignore[index]
        "files not read: test.jsonl", "files not read: train.jsonl",
    ]  # fmt: skip


def test_unknown_template(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.chat_template llama is no file: name a \.jinja file, or say"):
        make_data([DatasetConfig("x")], chat_template="llama")
    path = put(tmp_path / "a.jinja", TEMPLATES["chatml"])
    make_data([DatasetConfig("x")], chat_template=str(path))
