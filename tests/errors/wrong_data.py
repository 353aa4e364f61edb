"""Wrong inputs concerning data."""

from __future__ import annotations

import gzip
from pathlib import Path

from transformers import AutoTokenizer

from wrong_input import Case, copied, dataset, file


def token_added(model: Path) -> None:
    """Add a token to the tokenizer, but no row to the embedding."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(model)


CASES = {
    # The data
    "no dataset": Case(
        "data.datasets is empty: list at least one dataset with its dataset_path.", edit={"data.datasets": []}
    ),
    "no such file": Case(
        "dataset_path none/*.txt matches no file: set it to a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, "
        ".tsv, .parquet, .arrow.",
        edit={"data.datasets": [{"dataset_path": "none/*.txt"}]},
    ),
    "empty file": Case(
        "{here}/empty.txt contains no documents: remove it from the dataset, or add some.",
        edit={"data.datasets": [{"dataset_path": "empty.txt"}]},
        prepare=file("empty.txt", ""),
    ),
    "bad line": Case(
        "{here}/bad.jsonl, line 2: not valid JSON (Expecting ',' delimiter, column 13); correct the line.",
        edit={"data.datasets": [{"dataset_path": "bad.jsonl"}]},
        prepare=file("bad.jsonl", '{"text": "a"}\n{"text": "b"\n'),
    ),
    "sequence_len 100": Case(
        "data.sequence_len must be a positive multiple of 64 (the size of a GPU tile), not 100.",
        edit={"data.sequence_len": 100},
    ),
    "eval_fraction 2": Case(
        "data.eval_fraction must be at least 0 and less than 1, not 2.0.", edit={"data.eval_fraction": 2.0}
    ),
    "less data than a step": Case(
        "The training set has {sequences} sequences of 64 tokens, but one step takes 2,000 (1,000 micro-batches on each "
        "of 2 replicas): lower trainer.accumulate_grad_batches or data.sequence_len, or add data.",
        edit={"trainer.accumulate_grad_batches": 1000, "trainer.devices": 2},
    ),
    "nothing to validate on": Case(
        "there is no data to validate on: set data.eval_fraction above 0, or list data.eval_datasets.",
        edit={"data.eval_fraction": 0.0},
        command=["validate", "--config", "config.yaml"],
    ),
    "text that is not UTF-8": Case(
        "{here}/a.txt, line 1: not valid UTF-8; convert the file to UTF-8.",
        edit=dataset("a.txt"),
        prepare=file("a.txt", b"caf\xe9"),
    ),
    "unknown format": Case(
        "a.pdf is not in a supported format: convert it to one of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow (all but the last two may be compressed: .gz, .bz2, .xz, .zst).",
        edit=dataset("a.pdf"),
        prepare=file("a.pdf", "%PDF"),
    ),
    "directory without data": Case(
        "dataset_path d matches no file: set it to a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow.",
        edit=dataset("d"),
        prepare=file("d/readme.md", "none"),
    ),
    "damaged parquet file": Case(
        "{here}/a.parquet is not a readable parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.): recreate it.",
        edit=dataset("a.parquet"),
        prepare=file("a.parquet", "PAR1xxxx"),
    ),
    "damaged Arrow file": Case(
        "{here}/a.arrow is not a readable Arrow file (File is too small: 10): recreate it.",
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
        "{here}/a.jsonl, line 1: no field 'text' (found: body); set text_field to the field that holds it, or set messages_field, or question_field and answer_field, instead.",
        edit=dataset("a.jsonl"),
        prepare=file("a.jsonl", '{"body": "a"}'),
    ),
    "record that holds no text": Case(
        "{here}/a.jsonl, line 1: the field 'text' must be a string, not int.",
        edit=dataset("a.jsonl"),
        prepare=file("a.jsonl", '{"text": 3}'),
    ),
    "object for a list of records": Case(
        "{here}/a.json, line 1: expected a list of objects or strings, but found dict; put the records into a list, or rename the file to .jsonl if it has one record per line.",
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
        "max_tokens of {job}/texts/*.txt is 3, but the first document in shuffled order has 287 tokens: raise max_tokens, or split the document.",
        edit=dataset("{job}/texts/*.txt", max_tokens=3),
    ),
    "no tokens": Case(
        "max_tokens of {job}/texts/*.txt must be positive, not 0.", edit=dataset("{job}/texts/*.txt", max_tokens=0)
    ),
    "weight below 0": Case(
        "weight of {job}/texts/*.txt must be positive and finite, not -1.0.",
        edit=dataset("{job}/texts/*.txt", weight=-1.0),
    ),
    "weight of one dataset alone": Case(
        "{job}/texts/2.txt has no weight: give all datasets a weight, or none.",
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
        "dataset_path matches no file: set it to a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow.",
        edit=dataset(""),
    ),
    "no sequences": Case(
        "data.max_sequences is 0, but training needs a sequence, and so does evaluation unless eval_fraction is 0: raise it.",
        edit={"data.max_sequences": 0},
    ),
    "prefix that is no token": Case(
        "data.document_prefix contains 99999, which is not a token id of {job}/model: use ids from 0 to 319.",
        edit={"data.document_prefix": 99999},
    ),
    "mask that is no token": Case(
        "data.mask_tokens contains -5, which is not a token id of {job}/model: use ids from 0 to 319.",
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
        "The documents held out for evaluation (1 of 20) do not fill a sequence of 64000 tokens, and drop_tails drops partial ones: raise eval_fraction, set it to 0, or turn drop_tails off.",
        edit={"data.drop_tails": True, "data.sequence_len": 64_000},
    ),
    "no evaluation data there": Case(
        "dataset_path no.txt matches no file: set it to a file, a directory or a glob of .txt, .md, .json, .jsonl, .csv, .tsv, .parquet, .arrow.",
        edit={"data.eval_datasets": [{"dataset_path": "no.txt"}]},
    ),
    "evaluation on all that is trained on": Case(
        "Every document in data.datasets is also in data.eval_datasets: none is left for training.",
        edit={"data.eval_datasets": [{"dataset_path": "{job}/texts/*.txt"}]},
    ),
    "file for the cache": Case(
        "The cache directory config.yaml cannot be used (File exists): set data.cache_dir to a writable directory.",
        edit={"data.cache_dir": "config.yaml"},
    ),
    "token that the model does not have": Case(
        "The data contains token 320 ('<|im_end|>'), but the model's embedding has only 320 rows, for tokens 0 to 319: remove the tokens that were added to the tokenizer of copy, or add rows to the model with transformers' resize_token_embeddings and train them with LoRA's trainable_token_indices.",
        edit={"model.model_dir": "copy", "data.document_suffix": "<|im_end|>"},
        prepare=copied("model", token_added),
    ),
    "nothing evaluated at once": Case(
        "data.eval_gradient_accumulation_steps must be a positive integer, not 0.",
        edit={"data.eval_gradient_accumulation_steps": 0},
    ),
}
