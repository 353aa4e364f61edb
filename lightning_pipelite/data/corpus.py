"""Tokenises the documents of all datasets into one file, in parallel processes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_pipelite.data.config import PackingOptions
from lightning_pipelite.data.long_conversations import Cutter, Long
from lightning_pipelite.data.records import Record, UnreadableFileError, read_records, refuse
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.data.workers import map_in_order
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.progress import Progress
from lightning_pipelite.shared.wording import counted

# While it is tokenised, a batch takes about fifty times its size in memory; each also costs a message there and back.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 18

UNLABELLED = np.uint32(1 << 31)
"""Flag bit of a stored token that is never a label, such as one in a user's turn; the other bits are the token id."""


@dataclass
class LeftOut:
    """The parts of a dataset that are not trained on.

    Args:
        count: Number of records that `skip_bad_records` left out.
        first: The error of the first of them.
        files: The errors of files that it left out, entirely or from some point on.
        keys: Keys of records that are neither part of the document nor shown by the chat template.
        long: How conversations longer than a sequence were handled.
    """

    count: int = 0
    first: str = ""
    files: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    long: Long = field(default_factory=Long)

    def add(self, error: ConfigurationError) -> None:
        """Count a bad record, or keep the error of a file."""
        if isinstance(error, UnreadableFileError):
            self.files.append(str(error))
            return
        self.count += 1
        self.first = self.first or str(error)


@dataclass(frozen=True)
class Corpus:
    """What is kept in memory about the documents; those of each dataset are contiguous.

    Args:
        tokens: A file with the concatenated tokens of all documents, uint32; see `UNLABELLED`.
        lengths: Shape [documents], the number of tokens of each document, at least 1.
        digests: Shape [documents], a hash of each document's token ids, keyed by the seed.
        ends: For each dataset, the cumulative number of documents up to its end.
        left_out: For each dataset, what is not trained on.
    """

    tokens: Path
    lengths: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    ends: list[int]
    left_out: list[LeftOut]

    def documents(self, dataset: int) -> npt.NDArray[np.int64]:
        """Return the indices of a dataset's documents."""
        return np.arange(self.ends[dataset - 1] if dataset else 0, self.ends[dataset])


@dataclass(frozen=True)
class _Batch:
    dataset: int
    records: list[Record]
    read: int  # approximate number of bytes read so far, over the files of all datasets


@dataclass(frozen=True)
class _Encoded:
    dataset: int
    read: int
    tokens: bytes
    lengths: list[int]
    digests: list[int]
    errors: list[ConfigurationError] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    long: Long = field(default_factory=Long)


def tokenise(options: PackingOptions, files: list[list[Path]], tokenizer: DocumentTokenizer, path: Path) -> Corpus:
    """Read and tokenise each document once, in order.

    Args:
        options: The datasets, and how to handle bad records and long conversations.
        files: The files of each of ``options.sources``.
        tokenizer: Turns documents into token ids.
        path: The file to write the tokens to.

    Returns:
        The documents that have at least one token.

    Raises:
        ConfigurationError: If a record is bad and must not be skipped, or a dataset yields no tokens.
    """
    lengths, digests = array("q"), array("Q")
    counts = [0] * len(files)
    left_out = [LeftOut() for _ in files]
    encoder = _Encoder(tokenizer, options)
    size = sum(each.stat().st_size for paths in files for each in paths)
    with path.open("wb") as file, Progress("tokenising", size, "MB", 1e6) as progress:
        for encoded in map_in_order(encoder, _batches(options, files, left_out)):
            file.write(encoded.tokens)
            progress.reach(encoded.read)
            lengths.extend(encoded.lengths)
            digests.extend(encoded.digests)
            counts[encoded.dataset] += len(encoded.lengths)
            left_out[encoded.dataset].keys |= encoded.keys
            left_out[encoded.dataset].long.add(encoded.long)
            for error in encoded.errors:
                left_out[encoded.dataset].add(error)
    for dataset, count, bad in zip(options.sources, counts, left_out, strict=True):
        if not count:
            reason = f" ({counted(bad.count, 'record')} skipped, the first: {bad.first})" if bad.count else ""
            reason = f" ({bad.files[0]})" if bad.files else reason
            reason = f" ({bad.long})" if bad.long.conversations and not reason else reason
            raise ConfigurationError(
                f"{dataset.dataset_path} contains no document with any tokens{reason}: remove it, or add documents."
            )
    ends = np.cumsum(counts).tolist()
    return Corpus(path, np.asarray(lengths, np.int64), np.asarray(digests, np.uint64), ends, left_out)


def _batches(options: PackingOptions, files: list[list[Path]], left_out: list[LeftOut]) -> Iterator[_Batch]:
    before = 0
    for number, (dataset, paths) in enumerate(zip(options.sources, files, strict=True)):
        records: list[Record] = []
        characters = 0
        shapes = options.shapes[number] if options.shapes else [None] * len(paths)
        on_bad = left_out[number].add if options.skip_bad_records else refuse
        for path, shape in zip(paths, shapes, strict=True):
            size, within = path.stat().st_size, 0
            for record in read_records(path, dataset, on_bad, shape):
                records.append(record)
                characters += len(record)
                within += len(record)
                if len(records) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                    yield _Batch(number, records, before + min(within, size))
                    records, characters = [], 0
            before += size
        if records:
            yield _Batch(number, records, before)


class _Encoder:
    """Encodes a batch in a worker process."""

    def __init__(self, tokenizer: DocumentTokenizer, options: PackingOptions) -> None:
        self._tokenizer = tokenizer
        self._key = str(options.seed).encode()
        self._skip = options.skip_bad_records
        self._cutter = Cutter(
            tokenizer, options.sequence_len - len(tokenizer.sequence_prefix), options.long_conversations
        )

    def __call__(self, batch: _Batch) -> _Encoded:
        data, lengths, digests, errors = [], [], [], []
        keys, long = set[str](), Long()
        for result in self._documents(batch.records, keys, long):
            if isinstance(result, ConfigurationError):
                if not self._skip:
                    raise result
                errors.append(result)
                continue
            digest = None
            for ids, flags in result:
                if len(ids):
                    tokens = np.frombuffer(array("I", ids), np.uint32)  # three times as fast as numpy alone
                    if digest is None:  # one digest for all parts of a document, so that the split keeps them together
                        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8, key=self._key).digest()
                    data.append((tokens | flags).tobytes())
                    lengths.append(len(ids))
                    digests.append(int.from_bytes(digest, "little"))
        return _Encoded(batch.dataset, batch.read, b"".join(data), lengths, digests, errors, keys, long)

    def _documents(
        self, records: list[Record], keys: set[str], long: Long
    ) -> Iterator[list[tuple[list[int], np.uint32 | npt.NDArray[np.uint32]]] | ConfigurationError]:
        texts = [(record.document, record.place) for record in records if isinstance(record.document, str)]
        encoded = iter(self._tokenizer.encode_each(*zip(*texts, strict=True)) if texts else ())
        for record in records:
            if isinstance(record.document, str):
                keys.update(record.others)
                ids = next(encoded)
                yield ids if isinstance(ids, ConfigurationError) else [(ids, np.uint32(0))]
                continue
            try:
                parts = self._cutter.encode(record, keys, long)
            except ConfigurationError as error:
                yield error
            else:
                yield [(ids, np.where(said, np.uint32(0), UNLABELLED)) for ids, said in parts]
