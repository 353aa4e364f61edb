"""What can be wrong about data."""

from __future__ import annotations

import gzip
from pathlib import Path

from transformers import AutoTokenizer

from wrong_input import Case, copied, dataset, file


def token_added(model: Path) -> None:
    """To the tokenizer, not to the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(model)


CASES = {
    # The data
    "no dataset": Case(
        "data.datasets is empty: list at least one dataset with its dataset_path.", edit={"data.datasets": []}
    ),
    "no such file": Case(
        "dataset_path none/*.txt matches no file: name a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, "
        ".tsv, .parquet, .arrow.",
        edit={"data.datasets": [{"dataset_path": "none/*.txt"}]},
    ),
    "empty file": Case(
        "{here}/empty.txt holds no document: remove it from the dataset, or fill it.",
        edit={"data.datasets": [{"dataset_path": "empty.txt"}]},
        prepare=file("empty.txt", ""),
    ),
    "bad line": Case(
        "{here}/bad.jsonl, line 2: not valid JSON (Expecting ',' delimiter, column 13); correct the line.",
        edit={"data.datasets": [{"dataset_path": "bad.jsonl"}]},
        prepare=file("bad.jsonl", '{"text": "a"}\n{"text": "b"\n'),
    ),
    "sequence_len 100": Case(
        "data.sequence_len is 100: give a positive multiple of 64, the size of a GPU tile.",
        edit={"data.sequence_len": 100},
    ),
    "eval_fraction 2": Case(
        "data.eval_fraction is 2.0: give a number from 0 to below 1.", edit={"data.eval_fraction": 2.0}
    ),
    "less data than a step": Case(
        "The training set has {sequences} sequences of 64 tokens, but one step takes 2,000 (1,000 micro-batches on each "
        "of 2 replicas): lower trainer.accumulate_grad_batches or data.sequence_len, or add data.",
        edit={"trainer.accumulate_grad_batches": 1000, "trainer.devices": 2},
    ),
    "nothing to validate on": Case(
        "there is nothing to validate on: give data.eval_fraction a value above 0, or list data.eval_datasets.",
        edit={"data.eval_fraction": 0.0},
        command=["validate", "--config", "config.yaml"],
    ),
    "text that is not UTF-8": Case(
        "{here}/a.txt, line 1: not valid UTF-8; convert the file to UTF-8.",
        edit=dataset("a.txt"),
        prepare=file("a.txt", b"caf\xe9"),
    ),
    "unknown format": Case(
        "a.pdf has no known format: convert it to one of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow (all but the last two may be compressed: .gz, .bz2, .xz, .zst).",
        edit=dataset("a.pdf"),
        prepare=file("a.pdf", "%PDF"),
    ),
    "directory without data": Case(
        "dataset_path d matches no file: name a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow.",
        edit=dataset("d"),
        prepare=file("d/readme.md", "none"),
    ),
    "damaged parquet file": Case(
        "{here}/a.parquet is no readable parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.): write it anew.",
        edit=dataset("a.parquet"),
        prepare=file("a.parquet", "PAR1xxxx"),
    ),
    "damaged Arrow file": Case(
        "{here}/a.arrow is no readable Arrow file (File is too small: 10): write it anew.",
        edit=dataset("a.arrow"),
        prepare=file("a.arrow", "ARROW1xxxx"),
    ),
    "compressed file that ends too soon": Case(
        "{here}/a.jsonl.gz cannot be read (Compressed file ended before the end-of-stream marker was reached): check the file.",
        edit=dataset("a.jsonl.gz"),
        prepare=file("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9]),
    ),
    "file that is not compressed": Case(
        "{here}/a.txt.gz cannot be read (Not a gzipped file (b'pl')): check the file.",
        edit=dataset("a.txt.gz"),
        prepare=file("a.txt.gz", "plain text"),
    ),
    "record without the field": Case(
        "{here}/a.jsonl, line 1: no field 'text' (it has: body); set text_field to the field that holds it, or messages_field, or question_field and answer_field to those that do.",
        edit=dataset("a.jsonl"),
        prepare=file("a.jsonl", '{"body": "a"}'),
    ),
    "record that holds no text": Case(
        "{here}/a.jsonl, line 1: the field 'text' is int, not text; give it a string.",
        edit=dataset("a.jsonl"),
        prepare=file("a.jsonl", '{"text": 3}'),
    ),
    "object for a list of records": Case(
        "{here}/a.json, line 1: dict where a list of objects or strings is needed; put the records into a list, or name the file .jsonl if it has one record a line.",
        edit=dataset("a.json"),
        prepare=file("a.json", '{"text": "a"}'),
    ),
    "JSON nested too deeply": Case(
        "{here}/a.json, line 1: JSON nested too deeply; correct the file.",
        edit=dataset("a.json"),
        prepare=file("a.json", "[" * 100_000),
    ),
    "conversations without a template": Case(
        "The tokenizer of {job}/model has no chat template, which conversations need: set data.chat_template to alpaca, chatml or a .jinja file, or use an instruction-tuned model's tokenizer.",
        edit=dataset("a.jsonl", messages_field="m"),
        prepare=file("a.jsonl", '{"m": []}'),
    ),
    "fewer tokens than a document": Case(
        "max_tokens of {job}/texts/*.txt is 3, less than the first document in shuffled order has (287): raise it, or split the document.",
        edit=dataset("{job}/texts/*.txt", max_tokens=3),
    ),
    "no tokens": Case(
        "max_tokens of {job}/texts/*.txt is 0: give a positive number.", edit=dataset("{job}/texts/*.txt", max_tokens=0)
    ),
    "weight below 0": Case(
        "weight of {job}/texts/*.txt is -1.0: give a positive number.", edit=dataset("{job}/texts/*.txt", weight=-1.0)
    ),
    "weight of one dataset alone": Case(
        "{job}/texts/2.txt has no weight: give every dataset one, or none.",
        edit={
            "data.datasets": [
                {"dataset_path": "{job}/texts/1.txt", "weight": 1.0},
                {"dataset_path": "{job}/texts/2.txt"},
            ]
        },
    ),
    "unknown control class": Case(
        "data.datasets.control_class must be one of -1, 0, 1, not 2.",
        edit=dataset("{job}/texts/*.txt", control_class=2),
    ),
    "empty path": Case(
        "dataset_path matches no file: name a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow.",
        edit=dataset(""),
    ),
    "no sequences": Case(
        "data.max_sequences is 0: training needs a sequence, and so does evaluation unless eval_fraction is 0; give a larger number.",
        edit={"data.max_sequences": 0},
    ),
    "prefix that is no token": Case(
        "data.document_prefix holds 99999, which is no token id of {job}/model: give ids from 0 to 319.",
        edit={"data.document_prefix": 99999},
    ),
    "mask that is no token": Case(
        "data.mask_tokens holds -5, which is no token id of {job}/model: give ids from 0 to 319.",
        edit={"data.mask_tokens": [-5]},
    ),
    "prefix as long as a sequence": Case(
        "data.sequence_prefix is 400 tokens long, which leaves no room in a sequence of 64: shorten it, or raise data.sequence_len.",
        edit={"data.sequence_prefix": "word " * 100},
    ),
    "unknown packing": Case(
        "data.packing must be one of 'concatenate', 'best_fit' or null, not tight.", edit={"data.packing": "tight"}
    ),
    "sequences longer than the data": Case(
        "What is held out for evaluation (1 of 20 documents) fills no sequence of 64000 tokens, and drop_tails drops partial ones: raise eval_fraction, set it to 0, or turn drop_tails off.",
        edit={"data.drop_tails": True, "data.sequence_len": 64_000},
    ),
    "no evaluation data there": Case(
        "dataset_path no.txt matches no file: name a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow.",
        edit={"data.eval_datasets": [{"dataset_path": "no.txt"}]},
    ),
    "evaluation on all that is trained on": Case(
        "Every document of data.datasets is in data.eval_datasets, too: none is left for training.",
        edit={"data.eval_datasets": [{"dataset_path": "{job}/texts/*.txt"}]},
    ),
    "file for the cache": Case(
        "The cache directory config.yaml cannot be used (File exists): set data.cache_dir to a directory that can be written.",
        edit={"data.cache_dir": "config.yaml"},
    ),
    "token that the model does not have": Case(
        "The data has the token 320 ('<|im_end|>'), but the model's embedding has 320 rows, for 0 to 319: take what was added to the tokenizer of copy out again, or give the model as many rows (transformers' resize_token_embeddings), which LoRA's trainable_token_indices then trains.",
        edit={"model.model_dir": "copy", "data.document_suffix": "<|im_end|>"},
        prepare=copied("model", token_added),
    ),
    "nothing evaluated at once": Case(
        "data.eval_gradient_accumulation_steps is 0: give a positive integer.",
        edit={"data.eval_gradient_accumulation_steps": 0},
    ),
}
