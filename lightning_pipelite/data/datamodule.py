"""A LightningDataModule that provides packed sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pipelite.data.build import build_entry
from lightning_pipelite.data.cache import default_cache_dir
from lightning_pipelite.data.config import (
    HELD_OUT,
    DatasetConfig,
    LongConversations,
    MaskSpec,
    Packing,
    PackingOptions,
    TokenSpec,
)
from lightning_pipelite.data.entry import CacheEntry
from lightning_pipelite.data.loader import PackedLoader
from lightning_pipelite.data.looking import look_at, what_is_found
from lightning_pipelite.data.sampler import PackedSampler
from lightning_pipelite.data.sequences import PackedSequences
from lightning_pipelite.data.statistics import DataStatistics
from lightning_pipelite.data.templates import read_template
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import DealsData
from lightning_pipelite.shared.wording import counted

MUCH = 0.2
"""The summary reports a held-out share of tokens above this, if it is also more than twice `eval_fraction`."""


class PackedDataModule(LightningDataModule):
    """Packs documents into fixed-length sequences, cached on disk, and distributes them over data-parallel replicas.

    A sequence consists of `sequence_prefix` and then documents, each followed by `document_suffix`: a slice of their
    concatenation, or with best-fit packing as many as fit. A micro-batch is one sequence: a dict of int64 tensors of
    shape [1, sequence_len] with

    - ``input_ids``;
    - ``labels``: ``labels[t]`` is the token to be predicted from position t, so the loss is the cross-entropy of
      ``logits[t]`` against it; -100 at the end of the sequence, on padding, for masked tokens, and where the next
      token belongs to another document and `isolate_documents` is set;
    - ``control_classes``: ``control_classes[t]`` is the class of the document that ``labels[t]`` belongs to, 1 or -1;
      0 where there is no label, and for the sequence prefix;
    - ``position_ids``: restart at 0 at each document, at a document's continuation in the next sequence and at
      padding, so that attention stays within a document; the sequence prefix belongs to the first document.

    Training and evaluation share no documents: they are split before packing, identical documents stay on one side, and
    documents that occur in an evaluation dataset are excluded from training. Every token of a document that is kept is
    packed exactly once, unless an option drops it. Padding and empty micro-batches (all labels -100) fill up sequences
    and steps; nothing is dropped to make them even.

    Args:
        datasets: The sources of documents.
        sequence_len: Tokens per sequence, a multiple of 64.
        tokenizer_dir: Directory of the tokenizer; on the command line, the model's directory by default.
        eval_datasets: Sources of documents for evaluation only, each with its own loader. `eval_fraction` still holds
            out documents of `datasets` in addition.
        max_sequences: Pack at most this many sequences of `datasets`, training and held out together.
        drop_tails: Drop the rest of a document that does not fit into its sequence, so that every sequence begins with
            a new document, and drop the last, partial sequence.
        mix_datasets: Shuffle the documents of all datasets together. Otherwise no sequence mixes two datasets.
        packing: "concatenate" fills every sequence and splits documents at its end. "best_fit" pads instead, and splits
            only documents that are longer than a sequence. Null is best_fit if there are conversations, else
            concatenate.
        chat_template: The template that renders conversations, instead of the tokenizer's own: a file, such as
            chat_template.jinja; "alpaca" or "chatml", which are built in; or the template itself.
        long_conversations: How to handle conversations that are longer than a sequence. "split" cuts them before
            questions, so that each answer is learnt with its question and the system prompt; an answer that is too
            long on its own is cut off at the end of the sequence. "drop" leaves them out. "keep" continues them in the
            next sequence, where the answer is learnt without its question.
        sequence_prefix: Tokens at the start of each sequence: a text, an id or a list of ids. Null is the tokenizer's
            BOS if it has one (nothing if there are conversations, because the template writes it); "" is nothing.
        document_prefix: Tokens before each document except conversations: a text (joined to the document before
            tokenising), an id or a list of ids. Null or "" is nothing.
        document_suffix: Tokens after each document except conversations: a text (joined to the document before
            tokenising), an id or a list of ids. Null is the tokenizer's EOS if it has one; "" is nothing.
        mask_tokens: Tokens that are not labels and have no control class: true for all special tokens, or an id or a
            list of ids.
        eval_fraction: Share of documents held out for evaluation, at least one of two or more; 0 for none.
        eval_gradient_accumulation_steps: Micro-batches per evaluation step; each replica's share of an evaluation set
            is filled up to a multiple of it with empty micro-batches.
        isolate_documents: Isolate documents from each other by restarting ``position_ids``. Otherwise positions count
            from 0 to sequence_len - 1, documents may attend to each other, and labels cross their borders.
        add_prefix_space: Whether the tokenizer puts a space before a text. Conversations always use the tokenizer's own
            setting.
        trust_remote_code: Whether the tokenizer may run Python code from its directory.
        skip_bad_records: Leave out and count records that cannot be read, instead of raising an error.
        seed: Seed for the order of documents, the split, and the order of each epoch.
        cache_dir: Directory for packed data; by default ``lightning_pipelite`` in the user's cache directory.

    Attributes:
        eval_gradient_accumulation_steps: As given; an evaluation loop may take that many micro-batches at once.
        statistics: Documents, tokens, sequences and padding of all sets, after `prepare_data` or `setup`; else None.

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
        eval_datasets: list[DatasetConfig] | None = None,
        max_sequences: int | None = None,
        drop_tails: bool = False,
        mix_datasets: bool = False,
        packing: Packing | None = None,
        chat_template: str | None = None,
        long_conversations: LongConversations = "split",
        sequence_prefix: TokenSpec = None,
        document_prefix: TokenSpec = None,
        document_suffix: TokenSpec = None,
        mask_tokens: MaskSpec = None,
        eval_fraction: float = 0.01,
        eval_gradient_accumulation_steps: int = 1,
        isolate_documents: bool = True,
        add_prefix_space: bool = False,
        trust_remote_code: bool = False,
        skip_bad_records: bool = False,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if eval_gradient_accumulation_steps < 1:
            raise ConfigurationError(
                "data.eval_gradient_accumulation_steps must be a positive integer, not "
                f"{eval_gradient_accumulation_steps}."
            )
        self.sequence_len = sequence_len
        self._options = PackingOptions(
            datasets=datasets,
            eval_datasets=eval_datasets or [],
            sequence_len=sequence_len,
            max_sequences=max_sequences,
            drop_tails=drop_tails,
            mix_datasets=mix_datasets,
            packing=packing,
            chat_template=None if chat_template is None else read_template(chat_template),
            long_conversations=long_conversations,
            sequence_prefix=sequence_prefix,
            document_prefix=document_prefix,
            document_suffix=document_suffix,
            mask_tokens=mask_tokens,
            eval_fraction=eval_fraction,
            add_prefix_space=add_prefix_space,
            trust_remote_code=trust_remote_code,
            skip_bad_records=skip_bad_records,
            seed=seed,
        )
        self._tokenizer_dir = tokenizer_dir
        self._isolate_documents = isolate_documents
        self.eval_gradient_accumulation_steps = eval_gradient_accumulation_steps
        self._cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._cache: CacheEntry | None = None

    @property
    def control_classes(self) -> set[int]:
        """The classes of the training documents for Control Adapters: 1, -1, or both."""
        given = {dataset.control_class for dataset in self._options.datasets}
        return {1, -1} if 0 in given else set(given)

    @property
    def statistics(self) -> DataStatistics | None:
        """Statistics of what was packed; None before ``prepare_data`` or ``setup``."""
        return None if self._cache is None else self._cache.statistics

    @property
    def eval_names(self) -> list[str]:
        """The names of the evaluation sets, in the order of `val_dataloader`'s loaders."""
        return list(self._open().statistics.evals)

    @override
    def prepare_data(self) -> None:
        """Build the cache entry if it is missing, and open it.

        Raises:
            ConfigurationError: If files, tokenizer or cache directory are unusable; the message names them.
        """
        self._open()

    @override
    def setup(self, stage: str) -> None:
        """Open the cache entry, building it first on a node that does not share the cache."""
        self._open()

    def check(self, replicas: int, micro_batches_per_step: int) -> None:
        """Refuse a training set that is too small for one optimizer step.

        Args:
            replicas: Number of data-parallel replicas.
            micro_batches_per_step: Micro-batches per replica and step.

        Raises:
            ConfigurationError: If there are fewer sequences than one step takes.
        """
        sequences, needed = self._open().statistics.train.sequences, replicas * micro_batches_per_step
        if sequences < needed:
            raise ConfigurationError(
                f"The training set has {counted(sequences, 'sequence')} of {self._options.sequence_len} tokens, but "
                f"one step takes {needed:,} ({counted(micro_batches_per_step, 'micro-batch')} on each of "
                f"{counted(replicas, 'replica')}): lower trainer.accumulate_grad_batches or data.sequence_len, or add "
                "data."
            )

    def check_vocabulary(self, rows: int) -> None:
        """Refuse tokens that a model has no embedding for.

        Args:
            rows: Number of rows in the embedding.

        Raises:
            ConfigurationError: If a token id in the packed data is outside the embedding; the message names it.
        """
        largest = self._open().largest_token
        if largest >= rows:
            raise ConfigurationError(
                f"The data contains token {largest} ({self.tokenizer().decode([largest])!r}), but the model's "
                f"embedding has only {rows} rows, for tokens 0 to {rows - 1}: remove the tokens that were added to the "
                f"tokenizer of {self._directory()}, or add rows to the model with transformers' "
                "resize_token_embeddings and train them with LoRA's trainable_token_indices."
            )

    def without(self, tokens: set[int]) -> set[int]:
        """Return those of ``tokens`` that do not occur in the training set."""
        return self._open().train.without(tokens)

    def summary(self) -> list[str]:
        """Return lines that describe what was packed."""
        cache, options = self._open(), self._options
        lines = [f"train: {cache.statistics.train.describe(options.sequence_len)}"]
        for name, held_out in cache.statistics.evals.items():
            label = "eval" if self.eval_names == [HELD_OUT] else f"eval {name}"
            share = held_out.tokens / max(1, held_out.tokens + cache.statistics.train.tokens)
            lines.append(f"{label}: {held_out.describe(options.sequence_len)}")
            if name == HELD_OUT and share > max(MUCH, 2 * options.eval_fraction):
                lines[-1] += (
                    f"; {share:.0%} of all tokens, because whole documents are held out: split long ones to hold out "
                    "less"
                )
        if not cache.statistics.evals:
            two = "holding one out takes at least two different documents"
            lines.append(f"eval: none ({two if options.eval_fraction else 'eval_fraction is 0'})")
        lines += [f"dataset {dataset.describe()}" for dataset in cache.statistics.datasets]
        lines = [*self.found(), *lines]
        return [*lines, f"packed data: {cache.directory}"]

    def found(self) -> list[str]:
        """Return one line per dataset with the format of its records, and what is learnt from them.

        Raises:
            ConfigurationError: If files cannot be found, or the format of their records is ambiguous.
        """
        return what_is_found(self._look())

    @property
    def has_conversations(self) -> bool:
        """Whether any dataset has conversations, of which only the replies are learnt."""
        return any(shape.conversation for shapes in self._look().shapes or () for shape in shapes)

    @property
    def own_template(self) -> str | None:
        """The chat template that renders conversations, if it is not the tokenizer's own; else None."""
        return self._options.chat_template if self.has_conversations else None

    def tokenizer(self) -> DocumentTokenizer:
        """Load the tokenizer with the options that packing uses.

        Raises:
            ConfigurationError: If it cannot be loaded, or an option does not fit it.
        """
        return DocumentTokenizer(self._directory(), self._look())

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of this replica's micro-batches, in a new order each epoch."""
        cache = self._open()
        sampler = self._sampler(cache.train, shuffle=True, round_to=1)
        trainer = self.trainer if isinstance(self.trainer, Trainer) else None
        return PackedLoader(cache.train, sampler, fingerprint=cache.fingerprint, trainer=trainer, **self._on_gpu())

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """Return this replica's evaluation loaders, one for each of `eval_names`: a list, unless there is only one.

        Each is filled up with empty micro-batches to a multiple of `eval_gradient_accumulation_steps`.
        """
        loaders: list[DataLoader[dict[str, Tensor]]] = []
        for dataset in self._open().evals:
            sampler = self._sampler(dataset, shuffle=False, round_to=self.eval_gradient_accumulation_steps)
            loaders.append(DataLoader(dataset, batch_size=1, sampler=sampler, **self._on_gpu()))
        return loaders[0] if len(loaders) == 1 else loaders

    @override
    def test_dataloader(self) -> Any:
        raise ConfigurationError(
            "PackedDataModule has no test set: use Trainer.validate for its evaluation sets (eval_fraction and "
            "eval_datasets); to test on other data, create another PackedDataModule with that data as eval_datasets, "
            "and pass its val_dataloader() to Trainer.test."
        )

    def _sampler(self, dataset: PackedSequences, *, shuffle: bool, round_to: int) -> PackedSampler:
        strategy = None if self.trainer is None else self.trainer.strategy
        dealt = strategy.distributed_sampler_kwargs if isinstance(strategy, DealsData) else None
        replica = dealt or {"num_replicas": 1, "rank": 0}
        return PackedSampler(dataset, shuffle=shuffle, seed=self._options.seed, round_to=round_to, **replica)

    def _on_gpu(self) -> dict[str, Any]:
        """Return the loader's options: on a GPU, a worker process reads ahead and batches are pinned."""
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        if device is None or device.type != "cuda":
            return {}
        return {"pin_memory": True, "num_workers": 1, "persistent_workers": True}

    def _open(self) -> CacheEntry:
        if self._cache is None:
            entry = build_entry(self._cache_dir, self._look(), self._directory())
            self._cache = CacheEntry(entry, self._isolate_documents)
        return self._cache

    def _look(self) -> PackingOptions:
        self._options = look_at(self._options)
        return self._options

    def _directory(self) -> Path:
        if self._tokenizer_dir is None:
            raise ConfigurationError("data.tokenizer_dir is not set: set it to the directory of the model's tokenizer.")
        return Path(self._tokenizer_dir).expanduser()
