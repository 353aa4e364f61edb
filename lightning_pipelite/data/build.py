"""From files to the packed arrays of a cache entry."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from lightning_pipelite.data.config import DatasetConfig, PackingOptions
from lightning_pipelite.data.packing import Ints, Layout, choose_evaluation, lay_out, within_tokens
from lightning_pipelite.data.sequences import write_sequences
from lightning_pipelite.data.sources import read_documents
from lightning_pipelite.data.statistics import SplitStatistics
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError

FORMAT_VERSION = 1
"""Part of the cache key: raise it whenever the same options give other arrays, or arrays of another form."""

# Enough to keep the tokenizer's threads busy; while it works, it takes some fifty times a batch's size.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 20


class PackBuilder:
    """Tokenises each document once, then chooses, orders and packs.

    In memory stay a batch of text and three numbers a document; the tokens go through a file.

    Args:
        options: What to build.
        files: The files of each dataset in `options.datasets`.
        tokenizer: Turns texts into ids.
    """

    def __init__(self, options: PackingOptions, files: list[list[Path]], tokenizer: DocumentTokenizer) -> None:
        self._options = options
        self._files = files
        self._tokenizer = tokenizer
        self._lengths = array("q")
        self._digests = array("Q")

    def __call__(self, folder: Path) -> None:
        """Write ``train/``, ``eval/`` and ``meta.json``.

        Args:
            folder: An empty directory.

        Raises:
            ConfigurationError: If a document cannot be read, a dataset yields none, or evaluation no sequence.
        """
        options = self._options
        scratch = folder / "documents.u32"
        ends = []
        with scratch.open("wb") as file:
            for dataset, paths in zip(options.datasets, self._files, strict=True):
                for ids in self._tokenised(dataset, paths):
                    data = np.asarray(ids, np.uint32).tobytes()
                    file.write(data)
                    self._lengths.append(len(ids))
                    self._digests.append(self._digest(data))
                ends.append(len(self._lengths))
                if ends[-1] == (ends[-2] if len(ends) > 1 else 0):
                    raise ConfigurationError(
                        f"{dataset.dataset_path} holds no document with a token: remove it or fill it."
                    )

        lengths = np.asarray(self._lengths, np.int64)
        groups = self._in_order(ends, lengths)
        chosen = np.concatenate(groups)
        held_out = np.zeros(len(lengths), bool)
        held_out[chosen] = choose_evaluation(np.asarray(self._digests, np.uint64)[chosen], options.eval_fraction)

        # Evaluation first: what it takes of max_sequences is its share, training gets the rest.
        limit = options.max_sequences
        share = None if limit is None else min(max(1, round(limit * options.eval_fraction)), max(1, limit - 1))
        eval_layout = self._lay_out([group[held_out[group]] for group in groups], lengths, share)
        if held_out.any() and not eval_layout.sequences:
            raise ConfigurationError(
                f"What is held out for evaluation ({int(held_out.sum())} of {len(chosen)} documents) fills no sequence "
                f"of {options.sequence_len} tokens, and drop_tails drops partial ones: raise eval_fraction, set it "
                "to 0, or turn drop_tails off."
            )
        rest = None if limit is None else limit - eval_layout.sequences
        train_layout = self._lay_out([group[~held_out[group]] for group in groups], lengths, rest)

        tokens = np.memmap(scratch, np.uint32, mode="r")
        offsets = np.cumsum(lengths) - lengths
        statistics = {}
        for name, layout, side in (("train", train_layout, ~held_out), ("eval", eval_layout, held_out)):
            (folder / name).mkdir()
            write_sequences(
                folder / name,
                layout,
                tokens,
                offsets,
                sequence_len=options.sequence_len,
                prefix=self._tokenizer.sequence_prefix,
                padding_id=self._tokenizer.padding_id,
            )
            statistics[name] = asdict(self._statistics(layout, int(lengths[chosen[side[chosen]]].sum())))
        del tokens
        scratch.unlink()
        meta = {
            "statistics": statistics,
            "masked_ids": self._tokenizer.masked_ids,
            "padding_id": self._tokenizer.padding_id,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))

    def _tokenised(self, dataset: DatasetConfig, paths: list[Path]) -> Iterator[list[int]]:
        texts: list[str] = []
        characters = 0
        for text in chain.from_iterable(read_documents(path, dataset.text_field) for path in paths):
            texts.append(text)
            characters += len(text)
            if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield from filter(None, self._tokenizer.encode(texts))
                texts, characters = [], 0
        if texts:
            yield from filter(None, self._tokenizer.encode(texts))

    def _digest(self, data: bytes) -> int:
        key = str(self._options.seed).encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")

    def _in_order(self, ends: list[int], lengths: Ints) -> list[Ints]:
        """Shuffle each dataset's documents, keep its max_tokens, and mix the datasets if asked to."""
        seed = self._options.seed
        groups = []
        for number, dataset in enumerate(self._options.datasets):
            begin = ends[number - 1] if number else 0
            order = begin + np.random.default_rng((seed, number)).permutation(ends[number] - begin)
            count = within_tokens(lengths[order], dataset.max_tokens)
            if not count:
                raise ConfigurationError(
                    f"max_tokens of {dataset.dataset_path} is {dataset.max_tokens}, less than the first document in "
                    f"shuffled order has ({int(lengths[order[0]])}): raise it, or split the document."
                )
            groups.append(order[:count])
        if self._options.mix_datasets:
            mixed = np.concatenate(groups)
            groups = [mixed[np.random.default_rng((seed, len(groups))).permutation(len(mixed))]]
        return groups

    def _lay_out(self, groups: list[Ints], lengths: Ints, max_sequences: int | None) -> Layout:
        capacity = self._options.sequence_len - len(self._tokenizer.sequence_prefix)
        return lay_out(groups, lengths, capacity, drop_tails=self._options.drop_tails, max_sequences=max_sequences)

    def _statistics(self, layout: Layout, available_tokens: int) -> SplitStatistics:
        tokens = int(layout.kept.sum())
        positions = layout.sequences * self._options.sequence_len
        used = tokens + layout.sequences * len(self._tokenizer.sequence_prefix)
        return SplitStatistics(
            documents=len(layout.documents),
            tokens=tokens,
            sequences=layout.sequences,
            padding=1 - used / positions if positions else 0.0,
            dropped_tokens=available_tokens - tokens,
        )
