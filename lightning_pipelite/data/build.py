"""Build a cache entry of packed sequences from data files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
import transformers

from lightning_pipelite.data.cache import build_once, content_key, file_stamp, tokenizer_stamp
from lightning_pipelite.data.config import HELD_OUT, PackingOptions
from lightning_pipelite.data.corpus import Corpus, tokenise
from lightning_pipelite.data.looking import find_all
from lightning_pipelite.data.packed_set import PackedSet, PackingStatistics
from lightning_pipelite.data.packing import Ints, best_fit, lay_out
from lightning_pipelite.data.selection import choose_evaluation, class_of, within_tokens, within_weights
from lightning_pipelite.data.sequence_file import largest_token, write_sequences
from lightning_pipelite.data.together import nothing_left
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError

FORMAT_VERSION = 7
"""Part of the cache key: raise it whenever the same options yield different sequences or a different file format."""

META = "meta.json"


def build_entry(cache_dir: Path, options: PackingOptions, tokenizer_dir: Path) -> Path:
    """Return the cache entry for these options, files and tokenizer, building it if it is missing.

    Args:
        cache_dir: Directory of all cache entries.
        options: What to build, as returned by `look_at`.
        tokenizer_dir: Directory of the tokenizer.

    Returns:
        The entry's directory; see `PackBuilder`.

    Raises:
        ConfigurationError: If files, tokenizer or cache directory are unusable; the message names them.
    """
    if not tokenizer_dir.is_dir():
        raise ConfigurationError(
            f"data.tokenizer_dir {tokenizer_dir} is not a directory: set it to one with a tokenizer."
        )
    files = find_all(options)

    def key() -> str:
        return content_key(
            {
                "format": FORMAT_VERSION,
                "libraries": [tokenizers.__version__, transformers.__version__],
                "options": asdict(options),
                "files": [[file_stamp(path) for path in paths] for paths in files],
                "tokenizer": tokenizer_stamp(tokenizer_dir),
            }
        )

    before = key()

    def build(folder: Path) -> None:
        PackBuilder(options, files, DocumentTokenizer(tokenizer_dir, options))(folder)
        if key() != before:
            raise ConfigurationError("A data or tokenizer file changed while it was being read: start again.")

    return build_once(cache_dir, before, build)


class PackBuilder:
    """Tokenises each document once, then selects, orders and packs the documents.

    Only a few batches of text and a few numbers per document are held in memory; the tokens go through a file.

    Args:
        options: What to build.
        files: The files of each dataset in ``options.sources``.
        tokenizer: Turns documents into token ids.
    """

    def __init__(self, options: PackingOptions, files: list[list[Path]], tokenizer: DocumentTokenizer) -> None:
        self._options = options
        self._files = files
        self._tokenizer = tokenizer
        self._capacity = options.sequence_len - len(tokenizer.sequence_prefix)

    def __call__(self, folder: Path) -> None:
        """Write ``train.arrow``, ``eval-0.arrow`` and so on, and ``meta.json``.

        Args:
            folder: An empty directory.

        Raises:
            ConfigurationError: If a document cannot be read, a dataset has no documents, or an evaluation set fills no
                sequence.
        """
        scratch = folder / "documents.u32"
        corpus = tokenise(self._options, self._files, self._tokenizer, scratch)
        splits = self._splits(corpus)
        offsets = np.cumsum(corpus.lengths) - corpus.lengths
        classes = self._classes(corpus)
        fingerprints = []
        largest = self._tokenizer.padding_id
        for number, split in enumerate(splits):
            file = folder / ("train.arrow" if number == 0 else f"eval-{number - 1}.arrow")
            fingerprint = write_sequences(
                file,
                split.layout,
                scratch,
                offsets,
                classes,
                sequence_len=self._options.sequence_len,
                prefix=self._tokenizer.sequence_prefix,
                padding_id=self._tokenizer.padding_id,
            )
            fingerprints.append(fingerprint)
            largest = max(largest, largest_token(file))
        scratch.unlink()
        statistics = PackingStatistics(self._options, self._files, corpus, self._capacity).of(splits)
        meta = {
            "statistics": statistics.as_dict(),
            "fingerprint": fingerprints[0],
            "masked_ids": self._tokenizer.masked_ids,
            "padding_id": self._tokenizer.padding_id,
            "largest_token": largest,
            "prefix_len": len(self._tokenizer.sequence_prefix),
        }
        (folder / META).write_text(json.dumps(meta, indent=1))

    # Selection of documents

    def _splits(self, corpus: Corpus) -> list[PackedSet]:
        """Return the training set, the set held out from it (if not empty), and the evaluation datasets."""
        options, lengths = self._options, corpus.lengths
        chosen = [self._within_max_tokens(number, corpus) for number in range(len(corpus.ends))]
        groups, eval_groups = chosen[: len(options.datasets)], chosen[len(options.datasets) :]
        if eval_groups:
            elsewhere = corpus.digests[np.concatenate(eval_groups)]
            groups = [group[~np.isin(corpus.digests[group], elsewhere)] for group in groups]
            if not sum(map(len, groups)):
                raise nothing_left()
        everything = np.concatenate(groups)
        held_out = np.zeros(len(lengths), bool)
        held_out[everything] = choose_evaluation(corpus.digests[everything], options.eval_fraction)

        # The held-out set is packed first, limited to its share of max_sequences; training gets the rest.
        limit = options.max_sequences
        share = None if limit is None else min(max(1, round(limit * options.eval_fraction)), max(1, limit - 1))
        held = self._pack(HELD_OUT, self._mixed([group[held_out[group]] for group in groups]), lengths, share)
        if held_out.any() and not held.layout.sequences:
            raise ConfigurationError(
                f"The documents held out for evaluation ({int(held_out.sum())} of {len(everything)}) do not fill a "
                f"sequence of {options.sequence_len} tokens, and drop_tails drops partial ones: raise eval_fraction, "
                "set it to 0, or turn drop_tails off."
            )
        rest = None if limit is None else limit - held.layout.sequences
        train_groups = self._within_weights([group[~held_out[group]] for group in groups], lengths)
        splits = [self._pack("train", self._mixed(train_groups), lengths, rest)]
        if held.layout.sequences:
            splits.append(held)
        for name, dataset, group in zip(options.eval_names, options.eval_datasets, eval_groups, strict=True):
            splits.append(self._pack(name, [group], lengths, None))
            if not splits[-1].layout.sequences:
                raise ConfigurationError(
                    f"{dataset.dataset_path} in data.eval_datasets does not fill a sequence of {options.sequence_len} "
                    "tokens, and drop_tails drops partial ones: add data to it, or turn drop_tails off."
                )
        return splits

    def _within_max_tokens(self, number: int, corpus: Corpus) -> Ints:
        """Return as many of a dataset's documents as its max_tokens allows, in shuffled order."""
        dataset, documents = self._options.sources[number], corpus.documents(number)
        order = documents[np.random.default_rng((self._options.seed, number)).permutation(len(documents))]
        count = within_tokens(corpus.lengths[order], dataset.max_tokens)
        if not count:
            raise ConfigurationError(
                f"max_tokens of {dataset.dataset_path} is {dataset.max_tokens}, but the first document in shuffled "
                f"order has {int(corpus.lengths[order[0]])} tokens: raise max_tokens, or split the document."
            )
        return order[:count]

    def _within_weights(self, groups: list[Ints], lengths: Ints) -> list[Ints]:
        weights = [dataset.weight for dataset in self._options.datasets if dataset.weight is not None]
        if not weights:
            return groups
        limits = within_weights([int(lengths[group].sum()) for group in groups], weights)
        taken = [group[: within_tokens(lengths[group], limit)] for group, limit in zip(groups, limits, strict=True)]
        for dataset, group, limit in zip(self._options.datasets, taken, limits, strict=True):
            if not len(group):
                raise ConfigurationError(
                    f"the weight of {dataset.dataset_path} entitles it to {limit} training tokens, fewer than its "
                    "first document has: raise the weight, or add data to the dataset with the fewest tokens for its "
                    "weight."
                )
        return taken

    def _mixed(self, groups: list[Ints]) -> list[Ints]:
        if not self._options.mix_datasets:
            return groups
        mixed = np.concatenate(groups)
        return [mixed[np.random.default_rng((self._options.seed, len(self._files))).permutation(len(mixed))]]

    def _classes(self, corpus: Corpus) -> npt.NDArray[np.int8]:
        classes = np.empty(len(corpus.lengths), np.int8)
        for number, dataset in enumerate(self._options.sources):
            documents = corpus.documents(number)
            classes[documents] = dataset.control_class or class_of(corpus.digests[documents])
        return classes

    # Packing

    def _pack(self, name: str, groups: list[Ints], lengths: Ints, max_sequences: int | None) -> PackedSet:
        options = self._options
        if options.best_fit:
            layout = best_fit(groups, lengths, self._capacity, max_sequences=max_sequences, seed=options.seed)
        else:
            layout = lay_out(
                groups, lengths, self._capacity, drop_tails=options.drop_tails, max_sequences=max_sequences
            )
        return PackedSet(name, groups, layout)
