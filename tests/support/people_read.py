"""Data files as users have them that are read: the line reported for each, and the conversation in ChatML by hand."""

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

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": 1}}],
}
F = {"type": "function", "function": {"name": "f"}}

_BEGIN, _END = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REASONED = (
    "{% for m in messages %}" + _BEGIN + "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}" + _END + _PROMPT
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for each in tools %}{{ each.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}" + _BEGIN + "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments }}){% endfor %}" + _END + _PROMPT
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
        lambda folder: put(
            folder / "a.jsonl.gz", gzip.compress(json.dumps({"prompt": QUESTION, "response": ANSWER}).encode())
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
    "messages in ShareGPT's field": Case(
        lines("a.jsonl", {"conversations": MESSAGES}), f"messages: conversations; {TALKS}", PAIR
    ),
    "ShareGPT with common roles": Case(
        lines("a.jsonl", shared([("user", QUESTION), ("assistant", ANSWER)])),
        f"ShareGPT: conversations; {TALKS}",
        PAIR,
    ),
    "ShareGPT with role and value": Case(
        lines("a.jsonl", {"conversations": [{"role": each["role"], "value": each["content"]} for each in MESSAGES]}),
        f"messages: conversations; {TALKS}",
        PAIR,
    ),
    "ShareGPT with from and content": Case(
        lines("a.jsonl", {"conversations": [{"from": each["role"], "content": each["content"]} for each in MESSAGES]}),
        f"ShareGPT: conversations; {TALKS}",
        PAIR,
    ),
    "alpaca of which some have no input": Case(
        lines("a.jsonl", {"instruction": QUESTION, "output": ANSWER}, ALPACA),
        "alpaca: instruction, input, output; loss on output",
        PAIR,
        others=[TOLD],
    ),
    "alpaca in JSON, with null for no input": Case(
        lambda folder: put(folder / "a.json", json.dumps([{**ALPACA, "instruction": QUESTION, "input": None}])),
        "alpaca: instruction, output; loss on output",
        PAIR,
    ),
    "CSV with the numbers of its rows": Case(
        lambda folder: put(folder / "a.csv", f",question,answer\n0,{QUESTION},{ANSWER}\n"),
        "question/answer: question, answer; loss on answer",
        PAIR,
    ),
    "CSV with semicolons in quotes": Case(
        lambda folder: put(folder / "a.csv", f'\ufeff"question";"answer"\r\n"Who; it?";"{ANSWER}"\r\n'.encode()),
        "question/answer: question, answer; loss on answer",
        chat(("user", "Who; it?"), ("assistant", ANSWER)),
    ),
    "tabs": Case(
        lambda folder: put(folder / "a.TSV", f"question\tanswer\n{QUESTION}\t{ANSWER}\n"),
        "question/answer: question, answer; loss on answer",
        PAIR,
    ),
    "JSON lines with a mark of their byte order": Case(
        lambda folder: put(folder / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(QA).encode()),
        "question/answer: question, answer; loss on answer",
        PAIR,
    ),
    "columns that hold nothing": Case(
        parquet(
            "a.parquet",
            {
                "messages": [{**each, "tool_calls": None, "name": None} for each in MESSAGES],
                "tools": None,
                "system": None,
            },
        ),
        f"messages: messages; {TALKS}",
        PAIR,
    ),
    "a system prompt beside messages": Case(
        parquet("a.parquet", {"system_prompt": "Be brief.", "messages": MESSAGES}),
        f"messages: messages, system_prompt; {TALKS}",
        [*chat(("system", "Be brief.")), *PAIR],
    ),
    "the reasoning of a message": Case(
        lines("a.jsonl", {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "Hm."}]}),
        f"messages: messages; {TALKS}",
        chat(("user", QUESTION), ("assistant", f"[Hm.]{ANSWER}")),
        module={"chat_template": REASONED},
    ),
    "the reasoning of a column": Case(
        lines("a.jsonl", {**QA, "reasoning": "Hm."}),
        "question/answer: question, reasoning, answer; loss on answer",
        chat(("user", QUESTION), ("assistant", f"[Hm.]{ANSWER}")),
        module={"chat_template": REASONED},
    ),
    "tools and their calls": Case(
        lines(
            "a.jsonl", {"messages": [MESSAGES[0], CALL, {"role": "tool", "content": "42"}, MESSAGES[1]], "tools": [F]}
        ),
        f"messages: messages; {TALKS}",
        chat(("system", "f"), ("user", QUESTION), ("assistant", "f(1)"), ("tool", "42"), ("assistant", ANSWER)),
        module={"chat_template": TOOLS},
    ),
    "tools as text in parquet": Case(
        parquet("a.parquet", {"messages": json.dumps([MESSAGES[0], CALL]), "tools": json.dumps([F])}),
        f"messages: messages; {TALKS}",
        chat(("system", "f"), ("user", QUESTION), ("assistant", "f(1)")),
        module={"chat_template": TOOLS},
    ),
    "texts without fields": Case(
        lambda folder: put(folder / "a.json", json.dumps(["Once.", "Twice."])),
        "text: text; loss on everything",
        [("Once.<|im_end|>", True)],
        others=[[("Twice.<|im_end|>", True)]],
    ),
    "the other split of a saved DatasetDict": Case(
        several(
            lambda folder: save_dataset(folder / "train", ["secret", ""]),
            lambda folder: save_dataset(folder / "test", ["Once.", ""]),
            lambda folder: put(folder / "dataset_dict.json", '{"splits": ["train", "test"]}'),
        ),
        "text: text; loss on everything",
        [("Once.<|im_end|>", True)],
        path=".",
        options={"split": "test"},
    ),
    "what programs leave beside data": Case(
        several(
            lines("train.jsonl", QA),
            lines("train.jsonl~", {"text": "no"}),
            lines("._train.jsonl", {"text": "no"}),
            lines(".ipynb_checkpoints/train-checkpoint.jsonl", {"text": "no"}),
            lines("__MACOSX/._train.jsonl", {"text": "no"}),
            lambda folder: put(folder / "LICENSE.txt", "no"),
            lambda folder: put(folder / "Thumbs.db", "no"),
        ),
        "question/answer: question, answer; loss on answer",
        PAIR,
        path=".",
    ),
}
