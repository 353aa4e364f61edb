"""Data files as users have them that could mean several things, or nothing, and the errors they get."""

from __future__ import annotations

from people_files import (
    ALPACA,
    ANSWER,
    MESSAGES,
    QA,
    QUESTION,
    TWICE,
    Case,
    lines,
    parquet,
    put,
    several,
    shared,
)

SEVERAL = "the fields could mean"
CASES = {
    "two splits by a glob": Case(
        several(lines("train.jsonl", QA), lines("test.jsonl", QA)),
        "matches files of the splits test, train: set split to one of them, or match only its files",
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
        "files of the splits test, train, and more.jsonl, whose name indicates none; set split",
        path=".",
    ),
    "subsets": Case(
        several(parquet("main/train-00000-of-00001.parquet", QA), parquet("other/x-00000-of-00001.parquet", QA)),
        "has data only in its subfolders main, other: set dataset_path to one of them",
        path=".",
    ),
    "text beside alpaca": Case(
        lines("a.jsonl", {**ALPACA, "text": "all of it"}),
        rf"{SEVERAL} two things \(found: input, instruction, output, text\); set text_field: text, or question_field: "
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
    "answers alone": Case(lines("a.jsonl", {"output": ANSWER}), "only one of question and answer is recognised"),
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
        lines("a.jsonl", {"prompt": QUESTION, "chosen": ANSWER, "rejected": "x"}), "preferred and rejected answers"
    ),
    "choices": Case(
        lines("a.jsonl", {**QA, "choices": ["x"]}), "question comes with 'choices', which would be ignored"
    ),
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
        "line 2: 3 cells, but the first row names 2 columns",
    ),
    "CSV without names": Case(
        lambda folder: put(folder / "a.csv", "Who?,It\nWhat?,That\n"), "no field 'text'|no column 'text'|no field is"
    ),
    "reasoning that is not shown": Case(
        lines("a.jsonl", {**QA, "reasoning": "Hm."}), "the chat template does not render the reasoning"
    ),
    "an unknown speaker": Case(
        lines("a.jsonl", shared([("narrator", "x"), ("gpt", "y")])), "'narrator'; change it to one of"
    ),
    "tools that are not shown": Case(
        lines("a.jsonl", shared(TWICE, tools='[{"type": "function", "function": {"name": "f"}}]')),
        "the chat template does not render the tools of this conversation",
    ),
    "the same data, compressed and not": Case(
        several(lines("train.jsonl", QA), lines("train.jsonl.gz", QA)),
        "has train.jsonl and train.jsonl.gz, which by their names hold the same data",
        path=".",
    ),
    "two sets of texts for training": Case(
        several(*(lambda folder, name=name: put(folder / name, "x") for name in ("train_sft.txt", "train_gen.txt"))),
        "holds the splits train_gen, train_sft: set split to the one to train on",
        path=".",
    ),
    "an empty answer": Case(
        lines("a.jsonl", QA, {"question": QUESTION, "answer": " "}),
        "line 2: the reply in message 2 .* is empty; fill it in",
    ),
    "an answer of null": Case(
        lines("a.jsonl", QA, {"question": QUESTION, "answer": None}),
        "line 2: the field 'answer' must be a string, not NoneType",
    ),
    "an empty question in messages": Case(
        lines("a.jsonl", {"messages": [{"role": "user", "content": "\n "}, MESSAGES[1]]}),
        "answers an empty question",
    ),
    "a conversation that begins with the answer": Case(
        lines("a.jsonl", {"messages": [{"role": "system", "content": "Be."}, MESSAGES[1]]}), "has no question before"
    ),
    "roles of ShareGPT": Case(
        lines("a.jsonl", {"messages": [MESSAGES[0], {"role": "gpt", "content": ANSWER}]}),
        "the role of message 2 is 'gpt'; change it to assistant",
    ),
    "a value and a content": Case(
        lines("a.jsonl", {"messages": [MESSAGES[0], {**MESSAGES[1], "value": "x"}]}),
        "message 2 .* has both a value and a content",
    ),
    "a role and another": Case(
        lines("a.jsonl", {"messages": [MESSAGES[0], {**MESSAGES[1], "from": "human"}]}), "a role and a different from"
    ),
    "a weight of the record": Case(
        lines("a.jsonl", {"messages": MESSAGES, "weight": 0}), "has a 'weight' of 0, but all records count equally"
    ),
    "pictures": Case(lines("a.jsonl", shared(TWICE, image="a.png")), "is about 'image', which would be ignored"),
    "preferences alone": Case(
        lines("a.jsonl", {"chosen": MESSAGES, "rejected": MESSAGES}), "preferred and rejected answers"
    ),
    "answers in a list": Case(
        lines("a.jsonl", {"question": QUESTION, "context": "x", "answers": {"text": [ANSWER]}}),
        "only one of question and answer",
    ),
    "records within an object": Case(
        lambda folder: put(folder / "a.json", '{"data": [{"text": "x"}]}'),
        "expected a list of objects or strings, but found dict",
    ),
    "CSV of Windows": Case(
        lambda folder: put(folder / "a.csv", "question,answer\nW\xe4r?,x\n".encode("latin-1")),
        "line 2: not valid UTF-8",
    ),
}
