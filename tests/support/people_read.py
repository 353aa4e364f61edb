"""Files as people have them that are read: the line that is said of them, and the conversation in ChatML by hand."""

from __future__ import annotations

import gzip
import json

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
    Case,
    arrow,
    chat,
    lines,
    parquet,
    put,
    save_dataset,
    several,
    shared,
)

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
