"""The tokenizer of a model directory, with the tokens that go before and after each document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lightning_pipelite.data.chat import ChatRenderer, Flags
from lightning_pipelite.data.config import PackingOptions, TokenSpec
from lightning_pipelite.data.record_errors import naming
from lightning_pipelite.data.token_ids import check_ids
from lightning_pipelite.errors import ConfigurationError, first_line

_SAMPLE = ["The quick\n\n  brown fox's 3.14", " é漢字🙂\t<s> </s> [CLS] <|endoftext|>", "", "\r\nDEF foo(x): return x"]


class DocumentTokenizer:
    """Turns texts into the token ids that are packed.

    Args:
        tokenizer_dir: Directory of a tokenizer as `transformers` saves it.
        options: Determine what goes before and after documents and sequences, and what is masked.

    Attributes:
        sequence_prefix: Ids at the start of every sequence.
        masked_ids: Ids that are never a label.
        padding_id: The id that fills a sequence after its last document.

    Raises:
        ConfigurationError: If the tokenizer cannot be loaded or an option does not fit it.
    """

    def __init__(self, tokenizer_dir: Path, options: PackingOptions) -> None:
        self._name = tokenizer_dir
        self._tokenizer = self._load(options.add_prefix_space, options.trust_remote_code)
        if options.add_prefix_space:
            self._check_prefix_space(options.trust_remote_code)

        self._backend = self._fast_backend()
        # A chat template writes BOS itself if the model needs it.
        bos = None if options.has_conversations else self._tokenizer.bos_token_id
        self.sequence_prefix = self._resolve("sequence_prefix", options.sequence_prefix, bos)
        if len(self.sequence_prefix) >= options.sequence_len:
            raise ConfigurationError(
                f"data.sequence_prefix is {len(self.sequence_prefix)} tokens long, which leaves no room in a sequence "
                f"of {options.sequence_len}: shorten it, or raise data.sequence_len."
            )
        self.masked_ids = self._resolve_mask(options)
        # Not the tokenizer's pad token: some models' pad token is outside their embedding.
        eos = self._tokenizer.eos_token_id
        self.padding_id: int = 0 if eos is None else eos

        # Text is joined to the document before tokenising, so that tokens may span the join; ids are added afterwards.
        prefix, suffix = options.document_prefix, options.document_suffix
        self._text_before = prefix if isinstance(prefix, str) else ""
        self._text_after = suffix if isinstance(suffix, str) else ""
        self._ids_before = [] if self._text_before else self._resolve("document_prefix", prefix, None)
        self._ids_after = [] if self._text_after else self._resolve("document_suffix", suffix, eos)
        self._chat = None
        if options.has_conversations:
            # Loaded as in the model's training: setting add_prefix_space, even to false, changes some tokenizers.
            tokenizer = self._load(None, options.trust_remote_code)
            if options.chat_template is not None:
                tokenizer.chat_template = options.chat_template
            self._chat = ChatRenderer(tokenizer, tokenizer_dir)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise documents.

        Args:
            texts: The documents.

        Returns:
            The ids of each document, with its prefix and suffix; an empty list if there are no tokens at all.
        """
        if self._text_before or self._text_after:
            texts = [self._text_before + text + self._text_after for text in texts]
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            documents = [encoding.ids for encoding in encodings]
        else:
            documents = self._ids_of(self._tokenizer, list(texts))
        if self._ids_before:
            return [self._ids_before + ids + self._ids_after for ids in documents]
        for ids in documents:
            ids += self._ids_after  # in place: copying every document would cost two per cent of the time
        return documents

    def encode_each(self, texts: Sequence[str], places: Sequence[str]) -> list[list[int] | ConfigurationError]:
        """Tokenise documents as `encode` does, with an error in place of each that cannot be tokenised.

        Args:
            texts: The documents.
            places: Location of each, for errors.
        """
        try:
            with naming("", "some text is refused"):
                return list(self.encode(texts))
        except ConfigurationError:  # find out which text it is
            return [self._encode_one(text, place) for text, place in zip(texts, places, strict=True)]

    def _encode_one(self, text: str, place: str) -> list[int] | ConfigurationError:
        try:
            with naming(place, "the tokenizer rejects the text"):
                return self.encode([text])[0]
        except ConfigurationError as error:
            return error

    def encode_conversation(
        self,
        messages: list[dict[str, Any]],
        place: str,
        arguments: dict[str, Any] | None = None,
        others: tuple[str, ...] = (),
        passed_over: set[str] | None = None,
    ) -> tuple[list[int], Flags]:
        """Tokenise a conversation as `ChatRenderer.encode` does, without document prefix and suffix."""
        assert self._chat is not None
        return self._chat.encode(messages, place, arguments, others, passed_over)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, including special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _fast_backend(self) -> Any:
        """Return the Rust tokenizer, whose fast encoding omits offsets, or None if its results would differ."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            return None
        expected = self._ids_of(self._tokenizer, _SAMPLE)  # also disables padding and truncation
        backend.no_truncation()
        backend.no_padding()
        same = [e.ids for e in backend.encode_batch_fast(_SAMPLE, add_special_tokens=False)] == expected
        return backend if same else None  # a custom tokenizer class may do more than its backend

    def _load(self, add_prefix_space: bool | None, trust_remote_code: bool) -> Any:
        if not self._name.is_dir():
            raise ConfigurationError(
                f"data.tokenizer_dir {self._name} is not a directory: set it to one with a tokenizer."
            )
        try:
            return AutoTokenizer.from_pretrained(
                self._name,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **({} if add_prefix_space is None else {"add_prefix_space": add_prefix_space}),
            )
        except (
            Exception
        ) as error:  # whatever a damaged file or remote code raises, the user has to look at the directory
            raise ConfigurationError(
                f"No tokenizer can be loaded from {self._name} ({first_line(error)}): check its files."
            ) from error

    def _check_prefix_space(self, trust_remote_code: bool) -> None:
        """Refuse add_prefix_space if the tokenizer class silently ignores it, as several do."""
        with_space = self._ids_of(self._tokenizer, ["a", " a"])
        without = self._ids_of(self._load(False, trust_remote_code), ["a"])
        if with_space[0] == without[0] and with_space[0] != with_space[1]:
            raise ConfigurationError(
                f"data.add_prefix_space has no effect on the tokenizer of {self._name}: set it to false, or set "
                'document_prefix to " ".'
            )

    @staticmethod
    def _ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        # The call itself disables padding and truncation, which tokenizer.json may enable.
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded["input_ids"]

    def _resolve(self, key: str, value: TokenSpec, default: int | None) -> list[int]:
        if value is None:
            return [] if default is None else [default]
        if isinstance(value, str):
            return self._ids_of(self._tokenizer, [value])[0] if value else []
        return self._checked(key, [value] if isinstance(value, int) else value)

    def _resolve_mask(self, options: PackingOptions) -> list[int]:
        value = options.mask_tokens
        if value is None or value is False:
            return []
        if value is True:
            return sorted(set(self._tokenizer.all_special_ids))
        return sorted(set(self._checked("mask_tokens", [value] if isinstance(value, int) else value)))

    def _checked(self, key: str, ids: list[int]) -> list[int]:
        check_ids(key, ids, len(self._tokenizer), self._name)
        return list(ids)
