"""Files as people have them: what is found, the line that says it, and the labels beside a rendering by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_chat import CHATML
from test_sources import save_dataset
from transformers import PreTrainedTokenizerFast

from lightning_pipelite.data import DatasetConfig, PackedDataModule
from lightning_pipelite.data.templates import TEMPLATES
from lightning_pipelite.errors import ConfigurationError

Write = Callable[[Path], Any]
Part = tuple[str, bool]  # of the text, and whether it is learnt

TALKS = "loss on the assistant's turns"
QUESTION, ANSWER = "Who was it?", "It was the cat."


def chat(*messages: tuple[str, str], learnt: tuple[int, ...] = ()) -> list[Part]:
    """ChatML by hand; without `learnt` all replies are."""
    parts: list[Part] = []
    for number, (role, content) in enumerate(messages):
        parts.append((f"<|im_start|>{role}\n", False))
        parts.append((f"{content}<|im_end|>\n", role == "assistant" and (not learnt or number in learnt)))
    return parts


PAIR = chat(("user", QUESTION), ("assistant", ANSWER))
TWO = chat(("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION), ("assistant", ANSWER))
TWICE = [("human", "Hi"), ("gpt", "Hello"), ("human", QUESTION), ("gpt", ANSWER)]
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def lines(name: str, *records: Any) -> Write:
    return lambda folder: put(folder / name, "".join(json.dumps(record) + "\n" for record in records))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(name: str, *records: dict[str, Any]) -> Write:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(records)), folder / name)

    return write


def arrow(name: str, *records: dict[str, Any]) -> Write:
    def write(folder: Path) -> None:
        table = pa.Table.from_pylist(list(records))
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    return write


def several(*writes: Write) -> Write:
    return lambda folder: [write(folder) for write in writes]


@dataclass
class Case:
    write: Write
    says: str
    """The line, without the path; or what refuses it."""
    parts: list[Part] | None = None
    """None if it is refused."""
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)


def shared(turns: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **more}


QA = {"question": QUESTION, "answer": ANSWER}
ALPACA = {"instruction": "Tell me.", "input": QUESTION, "output": ANSWER}
TOLD = chat(("user", f"Tell me.\n\n{QUESTION}"), ("assistant", ANSWER))
SEVERAL = "the fields could mean"
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
    # Refused
    "two splits by a glob": Case(
        several(lines("train.jsonl", QA), lines("test.jsonl", QA)),
        "matches files of the splits test, train: set split to one of them, or name its files alone",
        path="*.jsonl",
    ),
    "no split to train on": Case(
        several(lines("dev.jsonl", QA), lines("test.jsonl", QA)),
        "holds the splits test, validation: set split to the one to train on",
        path=".",
    ),
    "several splits to train on": Case(
        several(*(parquet(f"{name}-00000-of-00001.parquet", QA) for name in ("train_sft", "train_gen", "test_sft"))),
        "holds the splits test_sft, train_gen, train_sft: set split to the one to train on",
        path=".",
    ),
    "a file of no split beside others": Case(
        several(lines("train.jsonl", QA), lines("test.jsonl", QA), lines("more.jsonl", QA)),
        "files of the splits test, train, and more.jsonl, whose name tells of none; set split",
        path=".",
    ),
    "subsets": Case(
        several(parquet("main/train-00000-of-00001.parquet", QA), parquet("other/x-00000-of-00001.parquet", QA)),
        "has no data in it but in its folders main, other: name one of them",
        path=".",
    ),
    "text beside alpaca": Case(
        lines("a.jsonl", {**ALPACA, "text": "all of it"}),
        rf"{SEVERAL} two things \(it has: input, instruction, output, text\); set text_field: text, or question_field: "
        "instruction and answer_field: output",
    ),
    "two answers": Case(
        lines("a.jsonl", {**QA, "solution": "x"}),
        f"{SEVERAL} two things .* set question_field: question and answer_field: answer, or question_field: question "
        "and answer_field: solution",
    ),
    "two conversations": Case(
        lines("a.jsonl", {"messages": MESSAGES, **shared(TWICE)}),
        "messages and conversations could both be the conversation; set messages_field to one of them",
    ),
    "answers alone": Case(lines("a.jsonl", {"output": ANSWER}), "only one side of question and answer is known"),
    "answers as text": Case(
        lines("a.jsonl", ALPACA),
        "text_field is output, which by its name answers 'instruction', and would be learnt without it",
        options={"text_field": "output"},
    ),
    "a text and an answer": Case(
        lines("a.jsonl", {"text": QUESTION, "answer": ANSWER}),
        f"{SEVERAL} two things .* text_field: text for the text alone, or question_field: text with answer_field: ans",
    ),
    "a prompt and its text": Case(
        lines("a.jsonl", {"prompt": QUESTION, "text": ANSWER}),
        f"{SEVERAL} two things .* or question_field: prompt with answer_field: text",
    ),
    "preferences": Case(
        lines("a.jsonl", {"prompt": QUESTION, "chosen": ANSWER, "rejected": "x"}), "answers to prefer and to avoid"
    ),
    "choices": Case(lines("a.jsonl", {**QA, "choices": ["x"]}), "questions with 'choices', which would not be shown"),
    "one message a record": Case(lines("a.jsonl", *MESSAGES), "the record is a single message"),
    "an empty question": Case(
        lines("a.jsonl", QA, {"question": " ", "answer": ANSWER}), r"line 2: the question \(question.*\) is empty"
    ),
    "no answer": Case(lines("a.jsonl", QA, {"question": QUESTION}), "line 2: no field 'answer'"),
    "another kind further on": Case(
        lines("a.jsonl", *[{"text": "x"}] * 30, {"text": "x", **ALPACA}), f"line 31: {SEVERAL} two things"
    ),
    "a record of another kind": Case(
        lines("a.jsonl", *[QA] * 30, {**QA, "messages": MESSAGES}), f"line 31: {SEVERAL} two things"
    ),
    "too many cells": Case(
        lambda folder: put(folder / "a.csv", "question,answer\na,b,c\n"),
        "line 2: 3 cells where the first row names 2 columns",
    ),
    "CSV without names": Case(
        lambda folder: put(folder / "a.csv", "Who?,It\nWhat?,That\n"), "no field 'text'|no column 'text'|no field is"
    ),
    "reasoning that is not shown": Case(
        lines("a.jsonl", {**QA, "reasoning": "Hm."}), "the chat template does not show the reasoning"
    ),
    "an unknown speaker": Case(lines("a.jsonl", shared([("narrator", "x"), ("gpt", "y")])), "'narrator'; give one of"),
    "tools that are not shown": Case(
        lines("a.jsonl", shared(TWICE, tools='[{"type": "function", "function": {"name": "f"}}]')),
        "the chat template shows no tools in this conversation",
    ),
}


@pytest.fixture(scope="module")
def chat_dir(make_tokenizer: Callable[..., Path]) -> Path:
    folder = make_tokenizer({"eos_token": "<|im_end|>"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path, name: str) -> None:
    case, folder = CASES[name], tmp_path / "data_of_people"
    folder.mkdir()
    case.write(folder)
    only = next(folder.iterdir()).name
    dataset = DatasetConfig(str(folder / (case.path or only)), **case.options)
    data = make_data([dataset], sequence_len=256, tokenizer_dir=str(chat_dir), eval_fraction=0, **case.module)
    if case.parts is None:
        with pytest.raises(ConfigurationError, match=case.says):
            data.prepare_data()
        return
    assert data.summary()[0] == f"{dataset.dataset_path}: {case.says}"
    assert len(data.train_dataloader().dataset) == 1
    (item,) = (item for item in data.train_dataloader())
    ids, labels = expected(case.parts, PreTrainedTokenizerFast.from_pretrained(chat_dir))
    assert item["input_ids"][0, : len(ids)].tolist() == ids
    assert item["labels"][0].tolist() == [*labels[1:], *[-100] * (256 - len(ids) + 1)]


def expected(parts: list[Part], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    text = "".join(words for words, _ in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [flag for words, flag in parts for _ in words]
    ids = encoded["input_ids"]
    return ids, [
        token if learnt[begin] else -100 for token, (begin, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]


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


LONG = [("human", "one two"), ("gpt", "three"), ("human", "four " * 9), ("gpt", "five " * 9), ("human", "so"),
        ("gpt", "six " * 99)]  # fmt: skip


@pytest.mark.parametrize("way", ["split", "drop", "keep"])
def test_long_conversations(
    make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path, way: str
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_dir)
    lines("a.jsonl", shared(LONG, system="Be."), shared([("human", "a"), ("gpt", "b")]))(tmp_path)
    data = make_data(
        [DatasetConfig(str(tmp_path / "a.jsonl"))], sequence_len=128, tokenizer_dir=str(chat_dir), eval_fraction=0,
        long_conversations=way,
    )  # fmt: skip
    (told,) = (line for line in data.summary() if line.startswith("dataset"))
    assert "1 conversations longer than 128 tokens" in told
    dataset = data.train_dataloader().dataset
    texts = []
    for index in range(len(dataset)):
        borders, length = dataset.borders(index)
        edges = [0, *borders.tolist(), length]
        ids = dataset[index]["input_ids"].tolist()
        texts += [ids[begin:end] for begin, end in itertools.pairwise(edges)]
    short = expected(chat(("user", "a"), ("assistant", "b")), tokenizer)[0]
    assert short in texts
    turns = [({"human": "user", "gpt": "assistant"}[who], words) for who, words in LONG]
    system = ("system", "Be.")
    if way == "drop":
        assert "(1 dropped)" in told
        assert texts == [short]
    elif way == "keep":
        assert "1 go on in the next sequence without their question" in told
        whole = expected(chat(system, *turns), tokenizer)[0]
        assert whole[:128] in texts
    else:
        assert "(2 parts made of them, each with its questions; 1 answers cut at the end)" in told
        first, second = chat(system, *turns[:4]), chat(system, *turns[4:])
        wanted = [short, expected(first, tokenizer)[0], expected(second, tokenizer)[0][:128]]
        assert sorted(texts) == sorted(wanted)


def test_parts_of_a_conversation_stay_on_one_side(
    make_data: Callable[..., PackedDataModule], tmp_path: Path, chat_dir: Path
) -> None:
    talks = [[(who, f"{name} {who} {number} " * 4) for number in range(6) for who in ("human", "gpt")]
             for name in "abcdefgh"]  # fmt: skip
    lines("a.jsonl", *map(shared, talks))(tmp_path)
    data = make_data(
        [DatasetConfig(str(tmp_path / "a.jsonl"))], sequence_len=128, tokenizer_dir=str(chat_dir), eval_fraction=0.3
    )
    sides = [data.train_dataloader(), data.val_dataloader()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_dir)
    names = [
        {name for item in side for name in re.findall(r"\b([a-h]) human", tokenizer.decode(item["input_ids"][0]))}
        for side in sides
    ]
    assert names[0] | names[1] == set("abcdefgh")
    assert not names[0] & names[1]


def test_unknown_template(make_data: Callable[..., PackedDataModule], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.chat_template llama is no file: name a \.jinja file, or say"):
        make_data([DatasetConfig("x")], chat_template="llama")
    path = put(tmp_path / "a.jinja", TEMPLATES["chatml"])
    make_data([DatasetConfig("x")], chat_template=str(path))
