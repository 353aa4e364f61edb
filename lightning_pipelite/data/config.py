"""What a user sets about the data, checked before any file is read."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, get_args

from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.errors import ConfigurationError

TokenSpec = int | str | list[int] | None
"""Tokens as a user writes them: an id, a text, a list of ids, or none for the option's default."""

MaskSpec = bool | int | list[int] | None
"""Tokens to mask: true for all special tokens, an id, a list of ids; none or false for no token."""


HELD_OUT = "held_out"
"""The name of the evaluation set that `eval_fraction` holds out."""

Packing = Literal["concatenate", "best_fit"]
"""How documents fill sequences."""

Format = Literal[
    "text", "messages", "sharegpt", "alpaca", "prompt_completion", "prompt_response", "question_answer"
]  # fmt: skip
"""What records may be."""

LongConversations = Literal["keep", "drop", "split"]
"""What becomes of conversations that are longer than a sequence."""


@dataclass
class DatasetConfig:
    """One source of documents.

    Args:
        dataset_path: A file, a directory (the files directly in it, or in its ``data``) or a glob (``**`` crosses
            directories) of ``.txt`` and ``.md`` (a document a file), ``.json`` (a list, or a record a line), ``.jsonl``
            (a record a line), ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``, all but the last two also with ``.gz``,
            ``.bz2``, ``.xz`` or ``.zst`` behind; or a directory that was downloaded from Hugging Face, or that its
            datasets saved.
        split: Of a directory whose files are of several splits by their names, the one to read, as in "train" or
            "train_sft"; null is that for training, for an evaluation the only other one.
        format: What records are: "text", "messages", "sharegpt", "alpaca" (instruction, input, output),
            "prompt_completion", "prompt_response" or "question_answer". Null finds it out from the first records.
        max_tokens: At most this many tokens of it, in whole documents, taken in shuffled order until one does not fit.
        control_class: The class of its documents for Control Adapters: 1, -1, or 0 for either, about half and half,
            decided by a document's content.
        weight: Its share of the training tokens beside the other datasets' weights. The dataset that runs out first
            sets the total; of the others, whole documents are left out. Null everywhere: all tokens of all datasets.
        text_field: The field or column of records that holds the text.
        messages_field: The field or column of records that holds a conversation, a list of messages with ``role`` and
            ``content`` or ``from`` and ``value``, in place of a text. The chat template renders it, with the record's
            ``tools``, ``documents`` and ``chat_template_kwargs``, and only the assistant's turns are labels, without
            those whose ``weight`` is 0 and those before the first question.
        question_field: The field or column that holds what is asked, beside `answer_field`. Both become a conversation;
            where there is a field ``input`` or ``context``, it is shown behind the question.
        answer_field: The field or column that holds the answer, which alone is learnt.
        system_field: The field or column that holds the system prompt of a conversation; null is ``system``,
            ``system_prompt`` or ``system_message`` where there is one.
        last_turn_only: Learn only what the assistant says behind the last question.
    """

    dataset_path: str
    split: str | None = None
    format: Format | None = None
    max_tokens: int | None = None
    control_class: Literal[-1, 0, 1] = 1
    weight: float | None = None
    text_field: str | None = None
    messages_field: str | None = None
    question_field: str | None = None
    answer_field: str | None = None
    system_field: str | None = None
    last_turn_only: bool = False

    def __post_init__(self) -> None:
        # "text" was the default, and stands beside messages_field in configurations that were saved with it.
        if self.text_field == "text" and self.messages_field is not None:
            self.text_field = None


@dataclass(frozen=True)
class PackingOptions:
    """The options that decide what the packed arrays hold: two equal ones on equal files give equal bytes.

    The fields and their defaults are those of `PackedDataModule`, which documents them.

    Raises:
        ConfigurationError: If a value is out of its range; the sentence names the key.
    """

    datasets: list[DatasetConfig]
    sequence_len: int
    eval_datasets: list[DatasetConfig] = field(default_factory=list)
    max_sequences: int | None = None
    drop_tails: bool = False
    mix_datasets: bool = False
    packing: Packing | None = None
    sequence_prefix: TokenSpec = None
    document_prefix: TokenSpec = None
    document_suffix: TokenSpec = None
    mask_tokens: MaskSpec = None
    eval_fraction: float = 0.01
    add_prefix_space: bool = False
    trust_remote_code: bool = False
    skip_bad_records: bool = False
    seed: int = 0
    chat_template: str | None = None
    long_conversations: LongConversations = "split"
    shapes: tuple[tuple[Shape, ...], ...] | None = None
    """Of each file of each of `sources`, once they were looked at."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigurationError("data.datasets is empty: list at least one dataset with its dataset_path.")
        for dataset in self.sources:
            if dataset.control_class not in (-1, 0, 1):
                raise ConfigurationError(
                    f"control_class of {dataset.dataset_path} is {dataset.control_class}: give -1, 0 or 1."
                )
            if dataset.max_tokens is not None and dataset.max_tokens < 1:
                raise ConfigurationError(
                    f"max_tokens of {dataset.dataset_path} is {dataset.max_tokens}: give a positive number."
                )
            _check_fields(dataset)
        if self.long_conversations not in ("keep", "drop", "split"):
            raise ConfigurationError(f"data.long_conversations is {self.long_conversations}: give keep, drop or split.")
        if self._all_conversations:
            for key in ("document_prefix", "document_suffix", "add_prefix_space"):
                if getattr(self, key) not in (None, "", False, []):
                    raise ConfigurationError(
                        f"data.{key} is not for conversations, which the chat template writes, and there are no "
                        "others: leave it out."
                    )
        weights = [dataset.weight for dataset in self.datasets]
        for dataset in self.datasets:
            if dataset.weight is None and any(weight is not None for weight in weights):
                raise ConfigurationError(f"{dataset.dataset_path} has no weight: give every dataset one, or none.")
            if dataset.weight is not None and not 0 < dataset.weight < float("inf"):
                raise ConfigurationError(
                    f"weight of {dataset.dataset_path} is {dataset.weight}: give a positive number."
                )
        for dataset in self.eval_datasets:
            if dataset.weight is not None:
                raise ConfigurationError(
                    f"{dataset.dataset_path} of data.eval_datasets has a weight: remove it, weights are for training."
                )
        if self.packing not in (None, "concatenate", "best_fit"):
            raise ConfigurationError(f"data.packing is {self.packing}: give concatenate, best_fit or null.")
        if self.drop_tails and self.best_fit:
            raise ConfigurationError(
                "data.drop_tails cuts documents, which best-fit packing never does: turn drop_tails off, or set "
                "data.packing to concatenate."
            )
        if self.sequence_len < 1 or self.sequence_len % 64:
            raise ConfigurationError(
                f"data.sequence_len is {self.sequence_len}: give a positive multiple of 64, the size of a GPU tile."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ConfigurationError(f"data.eval_fraction is {self.eval_fraction}: give a number from 0 to below 1.")
        if self.max_sequences is not None and self.max_sequences < (2 if self.eval_fraction else 1):
            raise ConfigurationError(
                f"data.max_sequences is {self.max_sequences}: training needs a sequence, and so does evaluation unless "
                "eval_fraction is 0; give a larger number."
            )
        if self.seed < 0:
            raise ConfigurationError(f"data.seed is {self.seed}: give 0 or a positive integer.")

    @property
    def sources(self) -> list[DatasetConfig]:
        """All datasets, those for evaluation last."""
        return [*self.datasets, *self.eval_datasets]

    @property
    def eval_names(self) -> list[str]:
        """A name for each of `eval_datasets`, from its path, no two the same."""
        names: list[str] = []
        for dataset in self.eval_datasets:
            name = _name_of(dataset.dataset_path)
            taken = [HELD_OUT, *names]
            number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}-{n}") not in taken)
            names.append(name if number == 1 else f"{name}-{number}")
        return names

    @property
    def has_conversations(self) -> bool:
        """Whether any document is one; of records that were not looked at yet, only those count that are named so."""
        return any(self._conversations)

    @property
    def _all_conversations(self) -> bool:
        return all(self._conversations)

    @property
    def _conversations(self) -> list[bool]:
        if self.shapes is not None:
            return [shape.conversation for shapes in self.shapes for shape in shapes]
        return [
            each.messages_field is not None or each.answer_field is not None or each.format not in (None, "text")
            for each in self.sources
        ]

    @property
    def best_fit(self) -> bool:
        """Whether documents are kept whole; null chooses that for conversations."""
        return self.has_conversations if self.packing is None else self.packing == "best_fit"


def _check_fields(dataset: DatasetConfig) -> None:
    """Refuse options that name the fields of two formats, or half of one."""
    where = dataset.dataset_path
    if dataset.format not in (None, *get_args(Format)):
        raise ConfigurationError(f"format of {where} is {dataset.format}: give one of {', '.join(get_args(Format))}.")
    if (dataset.question_field is None) != (dataset.answer_field is None):
        one, other = ("question_field", "answer_field")[:: 1 if dataset.answer_field is None else -1]
        raise ConfigurationError(f"{where} has a {one} without a {other}: give both.")
    given = [key for key in ("text_field", "messages_field", "question_field") if getattr(dataset, key) is not None]
    if len(given) > 1:
        raise ConfigurationError(f"{where} has a {given[0]} and a {given[1]}: give one of them.")
    kinds = {"text": "text_field", "messages": "messages_field", "sharegpt": "messages_field"}
    if given and dataset.format is not None and kinds.get(dataset.format, "question_field") != given[0]:
        raise ConfigurationError(
            f"{where} has the format {dataset.format} and a {given[0]}, which is of another: leave one of them out."
        )


def _name_of(dataset_path: str) -> str:
    """Return the last part of a path that is no glob, without endings.

    "wiki" of wiki.jsonl.gz, "texts" of texts/*.txt.
    """
    plain = [part for part in PurePath(dataset_path).parts if not re.search(r"[*?\[]", part)]
    return re.sub(r"[^\w-]+", "_", plain[-1].split(".")[0] if plain else "").strip("_") or "eval"
