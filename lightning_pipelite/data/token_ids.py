"""Checks that a tokenizer has the token ids that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_pipelite.data.config import PackingOptions
from lightning_pipelite.errors import ConfigurationError

_OPTIONS = ("sequence_prefix", "document_prefix", "document_suffix", "mask_tokens")
_MAY_BE_ADDED = 256  # upper bound on tokens that a tokenizer's class adds to those of its file; most add none


def check_ids(key: str, ids: Sequence[int], size: int, tokenizer_dir: Path, *, beyond: int = 0) -> None:
    """Refuse values that are not token ids of a tokenizer.

    Args:
        key: The data option, for the message.
        ids: The ids that the user has given.
        size: Number of tokens in the tokenizer.
        tokenizer_dir: Directory of the tokenizer, for the message.
        beyond: Number of further tokens that it may have.

    Raises:
        ConfigurationError: If a value is not an id.
    """
    for token in ids:
        if isinstance(token, bool) or not 0 <= token < size + beyond:
            raise ConfigurationError(
                f"data.{key} contains {token}, which is not a token id of {tokenizer_dir}: use ids from 0 to "
                f"{size - 1}."
            )


def first_check(options: PackingOptions, tokenizer_dir: Path) -> None:
    """Refuse ids that a tokenizer certainly does not have, by its file alone; imports nothing slow.

    Raises:
        ConfigurationError: If there is one.
    """
    values = {key: getattr(options, key) for key in _OPTIONS}
    given = {key: [value] if type(value) is int else value for key, value in values.items()}
    given = {key: value for key, value in given.items() if isinstance(value, list) and value}
    file = tokenizer_dir / "tokenizer.json"
    if not given or not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        size = Tokenizer.from_file(str(file)).get_vocab_size()
    except Exception:  # a damaged file may raise anything; it is reported when the tokenizer is loaded
        return
    for key, ids in given.items():
        check_ids(key, ids, size, tokenizer_dir, beyond=_MAY_BE_ADDED)
