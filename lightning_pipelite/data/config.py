"""User-facing data options, checked before any file is read."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, get_args

from lightning_pipelite.data.shapes import Shape
from lightning_pipelite.errors import ConfigurationError

TokenSpec = int | str | list[int] | None
"""Tokens as the user specifies them: an id, a text, a list of ids, or None for the option's default."""

MaskSpec = bool | int | list[int] | None
"""Tokens to mask: true for all special tokens, an id, or a list of ids; None or false for no tokens."""


HELD_OUT = "held_out"
"""The name of the evaluation set that `eval_fraction` holds out."""

Packing = Literal["concatenate", "best_fit"]
"""How documents are packed into sequences."""

Format = Literal[
    "text", "messages", "sharegpt", "alpaca", "prompt_completion", "prompt_response", "question_answer"
]  # fmt: skip
"""Record formats that a user can name."""

LongConversations = Literal["keep", "drop", "split"]
"""How to handle conversations that are longer than a sequence."""


@dataclass
class DatasetConfig:
    """One source of documents.

    Args:
        dataset_path: A file, a directory (the files directly in it, or in its ``data``) or a glob (``**`` crosses
            directories) of ``.txt`` and ``.md`` (one document per file), ``.json`` (a list, or one record per line),
            ``.jsonl`` (one record per line), ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``, all but the last two
            optionally compressed (``.gz``, ``.bz2``, ``.xz`` or ``.zst``); or a dataset directory downloaded from
            Hugging Face or saved by its datasets library.
        split: The split to read from a directory whose file names indicate several, such as "train" or "train_sft".
            Null selects the training split, or for evaluation the only other one.
        format: The format of the records: "text", "messages", "sharegpt", "alpaca" (instruction, input, output),
            "prompt_completion", "prompt_response" or "question_answer". Null detects it from the first records.
        max_tokens: Use at most this many tokens, as whole documents in shuffled order up to the first that does not
            fit.
        control_class: The class of its documents for Control Adapters: 1, -1, or 0 to assign each document one of the
            two by its content, about half each.
        weight: Its share of the training tokens, relative to the other datasets' weights. The dataset that runs out
            first determines the total; the others leave out whole documents. If no dataset has a weight, all tokens of
            all datasets are used.
        text_field: The field or column that holds the text.
        messages_field: The field or column that holds a conversation instead of a text: a list of messages with
            ``role`` and ``content``, or ``from`` and ``value``. The chat template renders it, with the record's
            ``tools``, ``documents`` and ``chat_template_kwargs``. Only the assistant's turns are labels, except those
            whose ``weight`` is 0 and those before the first question.
        question_field: The field or column that holds the question; requires `answer_field`. The two become a
            conversation, in which fields named ``input`` or ``context`` follow the question.
        answer_field: The field or column that holds the answer; only the answer is learnt.
        system_field: The field or column that holds the system prompt of a conversation. Null uses ``system``,
            ``system_prompt`` or ``system_message`` if the records have one of them.
        last_turn_only: Learn only what the assistant says after the last question.
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
        # "text" used to be the default, so configurations saved back then have it alongside messages_field.
        if self.text_field == "text" and self.messages_field is not None:
            self.text_field = None


@dataclass(frozen=True)
class PackingOptions:
    """The options that determine the packed arrays: equal options and equal files produce identical bytes.

    The fields and their defaults are those of `PackedDataModule`, which documents them.

    Raises:
        ConfigurationError: If a value is out of range; the message names the key.
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
    """The shape of each file's records, per dataset in `sources`; None until `look_at` has determined them."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigurationError("data.datasets is empty: list at least one dataset with its dataset_path.")
        for dataset in self.sources:
            if dataset.control_class not in (-1, 0, 1):
                raise ConfigurationError(
                    f"control_class of {dataset.dataset_path} must be -1, 0 or 1, not {dataset.control_class}."
                )
            if dataset.max_tokens is not None and dataset.max_tokens < 1:
                raise ConfigurationError(
                    f"max_tokens of {dataset.dataset_path} must be positive, not {dataset.max_tokens}."
                )
            _check_fields(dataset)
        if self.long_conversations not in ("keep", "drop", "split"):
            raise ConfigurationError(
                f"data.long_conversations must be keep, drop or split, not {self.long_conversations}."
            )
        if self._all_conversations:
            for key in ("document_prefix", "document_suffix", "add_prefix_space"):
                if getattr(self, key) not in (None, "", False, []):
                    raise ConfigurationError(
                        f"data.{key} does not apply to conversations, which the chat template renders, and all "
                        "documents are conversations: leave it out."
                    )
        weights = [dataset.weight for dataset in self.datasets]
        for dataset in self.datasets:
            if dataset.weight is None and any(weight is not None for weight in weights):
                raise ConfigurationError(f"{dataset.dataset_path} has no weight: give all datasets a weight, or none.")
            if dataset.weight is not None and not 0 < dataset.weight < float("inf"):
                raise ConfigurationError(
                    f"weight of {dataset.dataset_path} must be positive and finite, not {dataset.weight}."
                )
        for dataset in self.eval_datasets:
            if dataset.weight is not None:
                raise ConfigurationError(
                    f"{dataset.dataset_path} in data.eval_datasets has a weight: remove it; only training uses weights."
                )
        if self.packing not in (None, "concatenate", "best_fit"):
            raise ConfigurationError(f"data.packing must be concatenate, best_fit or null, not {self.packing}.")
        if self.drop_tails and self.best_fit:
            raise ConfigurationError(
                "data.drop_tails truncates documents, which best-fit packing never does: turn drop_tails off, or set "
                "data.packing to concatenate."
            )
        if self.sequence_len < 1 or self.sequence_len % 64:
            raise ConfigurationError(
                f"data.sequence_len must be a positive multiple of 64 (the size of a GPU tile), not "
                f"{self.sequence_len}."
            )
        if not 0 <= self.eval_fraction < 1:
            raise ConfigurationError(
                f"data.eval_fraction must be at least 0 and less than 1, not {self.eval_fraction}."
            )
        if self.max_sequences is not None and self.max_sequences < (2 if self.eval_fraction else 1):
            raise ConfigurationError(
                f"data.max_sequences is {self.max_sequences}, but training needs a sequence, and so does evaluation "
                "unless eval_fraction is 0: raise it."
            )
        if self.seed < 0:
            raise ConfigurationError(f"data.seed must be 0 or a positive integer, not {self.seed}.")

    @property
    def sources(self) -> list[DatasetConfig]:
        """All datasets, the evaluation datasets last."""
        return [*self.datasets, *self.eval_datasets]

    @property
    def eval_names(self) -> list[str]:
        """A unique name for each of `eval_datasets`, derived from its path."""
        names: list[str] = []
        for dataset in self.eval_datasets:
            name = _name_of(dataset.dataset_path)
            taken = [HELD_OUT, *names]
            number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}-{n}") not in taken)
            names.append(name if number == 1 else f"{name}-{number}")
        return names

    @property
    def has_conversations(self) -> bool:
        """Whether any dataset has conversations; before `look_at`, only explicitly configured ones count."""
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
        """Whether best-fit packing is used; if `packing` is None, it is for conversations."""
        return self.has_conversations if self.packing is None else self.packing == "best_fit"


def _check_fields(dataset: DatasetConfig) -> None:
    """Refuse options that name fields of two formats, or only one field of a pair."""
    where = dataset.dataset_path
    if dataset.format not in (None, *get_args(Format)):
        raise ConfigurationError(
            f"format of {where} must be one of {', '.join(get_args(Format))}, not {dataset.format}."
        )
    if (dataset.question_field is None) != (dataset.answer_field is None):
        one, other = ("question_field", "answer_field")[:: 1 if dataset.answer_field is None else -1]
        raise ConfigurationError(f"{where} has {one} but no {other}: set both.")
    given = [key for key in ("text_field", "messages_field", "question_field") if getattr(dataset, key) is not None]
    if len(given) > 1:
        raise ConfigurationError(f"{where} has both {given[0]} and {given[1]}: set only one of them.")
    kinds = {"text": "text_field", "messages": "messages_field", "sharegpt": "messages_field"}
    if given and dataset.format is not None and kinds.get(dataset.format, "question_field") != given[0]:
        raise ConfigurationError(
            f"{where} has format {dataset.format} and {given[0]}, which belongs to another format: remove one of them."
        )


def _name_of(dataset_path: str) -> str:
    """Return the last part of a path that is not a glob pattern, without its file extensions.

    For example "wiki" for wiki.jsonl.gz, "texts" for texts/*.txt.
    """
    plain = [part for part in PurePath(dataset_path).parts if not re.search(r"[*?\[]", part)]
    return re.sub(r"[^\w-]+", "_", plain[-1].split(".")[0] if plain else "").strip("_") or "eval"
