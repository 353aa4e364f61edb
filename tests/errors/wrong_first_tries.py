"""Further mistakes that newcomers make on their first day."""

from __future__ import annotations

import gzip
from pathlib import Path

from wrong_input import Case, Prepare, dataset, file

QA = '{"question": "Who?", "answer": "It."}\n'


def files(*names: str, content: str | bytes = QA) -> Prepare:
    """Write the same content to several files in the working directory."""

    def write(here: Path, job: Path) -> None:
        for name in names:
            file(name, gzip.compress(QA.encode()) if name.endswith(".gz") else content)(here, job)

    return write


CASES = {
    "a path for a list of datasets": Case(
        'data.datasets must be a list of datasets, not texts/*.txt; write \'[{"dataset_path": "texts/*.txt"}]\'.',
        ["--data.datasets", "texts/*.txt"],
    ),
    "a list of paths": Case(
        'data.datasets must be a list of datasets, not texts; write \'[{"dataset_path": "texts"}]\'.',
        ["--data.datasets", '["texts"]'],
    ),
    "a configuration without its option": Case(
        "config.yaml is not an option; did you mean --config config.yaml?", command=["fit", "config.yaml"]
    ),
    "a pattern that the shell has replaced": Case(
        "b.txt is not an option; if the shell expanded a pattern, put the pattern in quotes.",
        ["--data.datasets", "a.txt", "b.txt"],
        prepare=files("a.txt", "b.txt"),
    ),
    "no configuration": Case(
        "model.adapter, data.sequence_len must be given, in the configuration file or on the command line.",
        command=["fit", "--model.model_dir", "{job}/model", "--data.datasets", '[{"dataset_path": "texts"}]'],
    ),
    "a dataset of the hub": Case(
        "there is no file or directory tatsu-lab/alpaca; if it is a Hugging Face dataset, download it first (hf "
        "download tatsu-lab/alpaca --repo-type dataset --local-dir alpaca), and set dataset_path to alpaca.",
        edit=dataset("tatsu-lab/alpaca"),
    ),
    "a folder of languages": Case(
        "d has data only in its subfolders de, en: set dataset_path to one of them, such as d/de.",
        edit=dataset("d"),
        prepare=files("d/de/a.jsonl", "d/en/a.jsonl"),
    ),
    "a word processor's file": Case(
        "a.docx is not in a supported format: convert it to one of .txt, .md, .json,",
        edit=dataset("a.docx"),
        prepare=files("a.docx"),
    ),
    "a comma too many": Case(
        "{here}/a.json, line 1: not valid JSON (",
        edit=dataset("a.json"),
        prepare=file("a.json", '[{"text": "abc"},]'),
    ),
    "a GGUF file for a model": Case(
        "m.gguf is not a directory; model_dir must name a local Hugging Face model.", ["--model.model_dir", "m.gguf"]
    ),
    "four bits without a section": Case(
        "--load_in_4bit is not an option; did you mean --model.load_in_4bit?", ["--load_in_4bit", "true"]
    ),
    "GPUs by another name": Case("--gpus is not an option; did you mean --trainer.devices?", ["--gpus", "2"]),
    "a length that is no multiple": Case(
        "data.sequence_len must be a positive multiple of 64 (the size of a GPU tile), not 1000.",
        ["--data.sequence_len", "1000"],
    ),
    "the same data compressed and not": Case(
        "d has train.jsonl and train.jsonl.gz, which by their names hold the same data: move one of them elsewhere, "
        "or set dataset_path to the one to use.",
        edit=dataset("d"),
        prepare=files("d/train.jsonl", "d/train.jsonl.gz"),
    ),
    "the same data in two formats": Case(
        "d has x.csv and x.jsonl, which by their names hold the same data: move one of them elsewhere, or set "
        "dataset_path to the one to use.",
        edit=dataset("d"),
        prepare=files("d/x.csv", "d/x.jsonl"),
    ),
    "two sets of texts": Case(
        "d holds the splits train_gen, train_sft: set split to the one to train on, such as train_gen.",
        edit=dataset("d"),
        prepare=files("d/train_sft.txt", "d/train_gen.txt"),
    ),
    "answers alone": Case(
        "{here}/a.jsonl, line 1: only one of question and answer is recognised by its name (found: output); set ",
        edit=dataset("a.jsonl"),
        prepare=file("a.jsonl", '{"output": "x"}\n'),
    ),
    "preferences": Case(
        "{here}/a.jsonl, line 1: the records have preferred and rejected answers (found: chosen, prompt, rejected), so ",
        edit=dataset("a.jsonl"),
        prepare=file("a.jsonl", '{"prompt": "x", "chosen": "y", "rejected": "z"}\n'),
    ),
    "a merge without its base": Case(
        "base, output must be given on the command line.", command=["merge", "--adapter", "{job}/adapter"]
    ),
    "a preview of nothing": Case(
        "config must be given on the command line: --config FILE, as for fit.", command=["preview"]
    ),
}
