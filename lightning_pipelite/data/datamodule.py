"""Packed sequences for the Lightning Trainer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pipelite.data.build import FORMAT_VERSION, PackBuilder
from lightning_pipelite.data.cache import build_once, content_key, default_cache_dir, file_stamp, tokenizer_stamp
from lightning_pipelite.data.config import DatasetConfig, MaskSpec, PackingOptions, TokenSpec
from lightning_pipelite.data.sampler import PackedSampler
from lightning_pipelite.data.sequences import PackedSequences
from lightning_pipelite.data.sources import find_files
from lightning_pipelite.data.statistics import DataStatistics, SplitStatistics
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError


class PackedDataModule(LightningDataModule):
    """Packs documents into sequences of fixed length, once, into a cache on disk, and deals them to replicas.

    A sequence is `sequence_prefix` and then a slice of the concatenated documents, each followed by `document_suffix`.
    A micro-batch is one sequence: a dict of int64 tensors of shape [1, sequence_len] with

    - ``input_ids``;
    - ``labels``: ``labels[t]`` is the token to be predicted from position t, so that the loss is the cross-entropy of
      ``logits[t]`` against it; -100 at the end of the sequence, on padding, for masked tokens, and where the next
      token belongs to another document that `isolate_documents` keeps apart;
    - ``position_ids``: restart at 0 at each document, at a document's continuation in the next sequence and at
      padding, so that attention stays within a document; the sequence prefix belongs to the first document.

    Train and evaluation share no document: they are split before slicing, and equal documents stay on one side. Every
    token of a document that is kept is packed exactly once, unless an option drops it. Padding and empty micro-batches
    (all labels -100) make the data fit; nothing is dropped for that.

    Args:
        datasets: The sources of documents.
        sequence_len: Tokens of a sequence, a multiple of 64.
        tokenizer_dir: Directory of the tokenizer; the command line takes it from the model's.
        max_sequences: At most this many sequences, training and evaluation together.
        drop_tails: Drop the rest of a document that a sequence has no room for, so that every sequence begins with a
            fresh document, and the last, partial sequence.
        mix_datasets: Shuffle the documents of all datasets together. Otherwise no sequence mixes two datasets.
        sequence_prefix: Tokens that begin each sequence: null is the tokenizer's BOS if it has one, "" nothing; or a
            text, an id, a list of ids.
        document_prefix: Tokens before each document: null or "" is nothing; or a text (joined to the document before
            tokenising), an id, a list of ids.
        document_suffix: Tokens after each document: null is the tokenizer's EOS if it has one, "" nothing; or a text
            (joined to the document before tokenising), an id, a list of ids.
        mask_tokens: Tokens that are no labels: true is all special tokens; or an id, a list of ids.
        eval_fraction: Share of documents held out for evaluation, at least one of two or more; 0 for no evaluation.
        eval_gradient_accumulation_steps: Micro-batches of an evaluation step: each replica's share of the evaluation
            set is filled up to a multiple of it with empty ones.
        isolate_documents: Keep documents apart by ``position_ids``. Otherwise they count from 0 to sequence_len - 1,
            and labels cross borders, as documents may then see each other.
        add_prefix_space: Whether the tokenizer puts a space before a text.
        trust_remote_code: Whether the tokenizer may run Python code from its directory.
        seed: Of the order of documents, of the split and of each epoch's order.
        cache_dir: Where packed data is kept; by default ``lightning_pipelite`` in the user's cache directory.

    Attributes:
        eval_gradient_accumulation_steps: As given; whoever runs evaluation may take that many micro-batches at once.
        statistics: Documents, tokens, sequences and padding of both sets, after `prepare_data` or `setup`; else None.

    Raises:
        ConfigurationError: If an option is out of its range.

    Example::

        data = PackedDataModule([DatasetConfig("books/*.txt")], sequence_len=4096, tokenizer_dir="Llama-3.1-8B")
        trainer.fit(model, datamodule=data)
    """

    def __init__(
        self,
        datasets: list[DatasetConfig],
        sequence_len: int,
        tokenizer_dir: str | None = None,
        *,
        max_sequences: int | None = None,
        drop_tails: bool = False,
        mix_datasets: bool = False,
        sequence_prefix: TokenSpec = None,
        document_prefix: TokenSpec = None,
        document_suffix: TokenSpec = None,
        mask_tokens: MaskSpec = None,
        eval_fraction: float = 0.01,
        eval_gradient_accumulation_steps: int = 1,
        isolate_documents: bool = True,
        add_prefix_space: bool = False,
        trust_remote_code: bool = False,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if eval_gradient_accumulation_steps < 1:
            raise ConfigurationError(
                f"data.eval_gradient_accumulation_steps is {eval_gradient_accumulation_steps}: give a positive integer."
            )
        self._options = PackingOptions(
            datasets=datasets,
            sequence_len=sequence_len,
            max_sequences=max_sequences,
            drop_tails=drop_tails,
            mix_datasets=mix_datasets,
            sequence_prefix=sequence_prefix,
            document_prefix=document_prefix,
            document_suffix=document_suffix,
            mask_tokens=mask_tokens,
            eval_fraction=eval_fraction,
            add_prefix_space=add_prefix_space,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        self._tokenizer_dir = tokenizer_dir
        self._isolate_documents = isolate_documents
        self.eval_gradient_accumulation_steps = eval_gradient_accumulation_steps
        self._cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._cache_entry: Path | None = None
        self._train: PackedSequences | None = None
        self._eval: PackedSequences | None = None
        self.statistics: DataStatistics | None = None

    @override
    def prepare_data(self) -> None:
        """Build the cache entry if it is missing, and open it.

        Raises:
            ConfigurationError: If files, tokenizer or cache directory are not usable; the sentence names them.
        """
        self._open()

    @override
    def setup(self, stage: str) -> None:
        """Open the cache entry, on a node that does not share the cache after building it there."""
        self._open()

    def check(self, replicas: int, micro_batches_per_step: int) -> None:
        """Refuse a training set that does not fill one optimizer step.

        Args:
            replicas: Data-parallel replicas.
            micro_batches_per_step: Micro-batches of each replica a step.

        Raises:
            ConfigurationError: If there are fewer sequences than one step takes.
        """
        self._open()
        assert self.statistics is not None
        sequences, needed = self.statistics.train.sequences, replicas * micro_batches_per_step
        if sequences < needed:
            raise ConfigurationError(
                f"The training set has {sequences} sequences of {self._options.sequence_len} tokens, but one step "
                f"takes {needed} ({micro_batches_per_step} micro-batches on each of {replicas} replicas): lower "
                "trainer.accumulate_grad_batches or data.sequence_len, or add data."
            )

    def summary(self) -> list[str]:
        """Tell in lines what was packed; `prepare_data` or `setup` comes first."""
        self._open()
        assert self.statistics is not None
        held_out = self.statistics.eval
        if held_out.sequences:
            evaluation = held_out.describe(self._options.sequence_len)
        elif self._options.eval_fraction == 0:
            evaluation = "none (eval_fraction is 0)"
        else:
            evaluation = "none (it takes two different documents to hold one out)"
        return [
            f"train: {self.statistics.train.describe(self._options.sequence_len)}",
            f"eval: {evaluation}",
            f"packed data: {self._cache_entry}",
        ]

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Give this replica's micro-batches, in an order of its own each epoch."""
        self._open()
        assert self._train is not None
        return self._loader(self._train, shuffle=True, round_to=1)

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Give this replica's evaluation micro-batches, or an empty list if nothing is held out."""
        self._open()
        assert self._eval is not None
        if len(self._eval) == 0:
            return []
        return self._loader(self._eval, shuffle=False, round_to=self.eval_gradient_accumulation_steps)

    def _loader(self, dataset: PackedSequences, *, shuffle: bool, round_to: int) -> DataLoader[dict[str, Tensor]]:
        strategy = getattr(self.trainer, "strategy", None)
        replica = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        sampler = PackedSampler(dataset, shuffle=shuffle, seed=self._options.seed, round_to=round_to, **replica)
        device = getattr(strategy, "root_device", None)
        pin_memory = device is not None and device.type == "cuda"
        return DataLoader(dataset, batch_size=1, sampler=sampler, pin_memory=pin_memory)

    def _open(self) -> None:
        if self.statistics is not None:
            return
        if self._tokenizer_dir is None:
            raise ConfigurationError("data.tokenizer_dir is not set: name the directory of the model's tokenizer.")
        directory = Path(self._tokenizer_dir).expanduser()
        if not directory.is_dir():
            raise ConfigurationError(f"data.tokenizer_dir {directory} is no directory: name one with a tokenizer.")
        files = [find_files(dataset.dataset_path) for dataset in self._options.datasets]

        def key() -> str:
            return content_key(
                {
                    "format": FORMAT_VERSION,
                    "libraries": [tokenizers.__version__, transformers.__version__],
                    "options": asdict(self._options),
                    "files": [[file_stamp(path) for path in paths] for paths in files],
                    "tokenizer": tokenizer_stamp(directory),
                }
            )

        before = key()

        def build(folder: Path) -> None:
            PackBuilder(self._options, files, DocumentTokenizer(directory, self._options))(folder)
            if key() != before:
                raise ConfigurationError("A data or tokenizer file changed while it was read: start again.")

        entry = build_once(self._cache_dir, before, build)
        try:
            meta = json.loads((entry / "meta.json").read_text())
            common = {
                "isolate_documents": self._isolate_documents,
                "masked_ids": meta["masked_ids"],
                "padding_id": meta["padding_id"],
            }
            self._train = PackedSequences(entry / "train", **common)
            self._eval = PackedSequences(entry / "eval", **common)
            sides = {name: SplitStatistics(**values) for name, values in meta["statistics"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"The cache entry {entry} is damaged ({error}): delete it.") from error
        self._cache_entry = entry
        self.statistics = DataStatistics(**sides)
