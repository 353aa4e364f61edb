"""``pipelite preview``: the first packed sequences as text."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lightning_pipelite.cli.command_options import check_sequences
from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.cli.error_messages import explain
from lightning_pipelite.data.datamodule import PackedDataModule
from lightning_pipelite.data.sequences import IGNORED, PackedSequences
from lightning_pipelite.data.tokens import DocumentTokenizer
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.wording import counted

_RESET = "\x1b[0m"
_BOLD, _MASKED, _PADDING = "\x1b[1m", "\x1b[2;3m", "\x1b[2m"
_CLASSES = {1: "\x1b[32m", -1: "\x1b[35m"}


def preview(config: str | Configuration, sequences: int = 3) -> str:
    """Pack a configuration's data as fit does, and show the first sequences that training sees.

    Each document starts with a header line, which gives its control class if there are classes other than +1. Text
    that is not learnt (questions, masked tokens, and the first token of each document, which has no context) is dim if
    colour is used, and in « » if not. Colour is used on terminals, and elsewhere if FORCE_COLOR is set, unless NO_COLOR
    is set. The model is not loaded.

    Args:
        config: The configuration of `pipelite fit`: a file, or on the command line several --config and options of fit.
        sequences: Number of sequences to show.
    """
    check_sequences(sequences)
    data = data_of(config)
    loader = data.train_dataloader()
    dataset = loader.dataset
    assert isinstance(dataset, PackedSequences)
    writer = _Writer(data.tokenizer(), _colour(), data.control_classes != {1})
    indices = [index for index in itertools.islice(iter(loader.sampler), sequences) if index is not None]
    shown = ["\n".join(writer.lines(dataset, index, number)) for number, index in enumerate(indices, start=1)]
    return "\n\n".join(["\n".join([*data.summary(), writer.legend()]), *shown])


def data_of(config: str | Configuration) -> PackedDataModule:
    """Build the data module of a configuration for `pipelite fit`.

    Raises:
        ConfigurationError: If the configuration or its data options are not usable.
    """
    given = Configuration.of(config)
    given.require_files()
    options = given.read()["data"]
    lacks_data = options.get("datasets") is None and options.get("sequence_len") is None
    if lacks_data or options["tokenizer_dir"] is None:
        missing = "data" if lacks_data else "model.model_dir"
        raise ConfigurationError(f"{missing} must be given in {given}; set it as for pipelite fit.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PackedDataModule, "data")
    try:
        checked = parser.parse_object({"data": {key: value for key, value in options.items() if value is not None}})
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), {"preview": parser})) from None
    data: PackedDataModule = parser.instantiate_classes(checked).data
    return data


def _colour() -> bool:
    return not os.environ.get("NO_COLOR") and (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR")))


class _Writer:
    def __init__(self, tokenizer: DocumentTokenizer, colour: bool, has_classes: bool) -> None:
        self._tokenizer = tokenizer
        self._colour = colour
        self._has_classes = has_classes

    def legend(self) -> str:
        """Explain the marks."""
        hidden = self._in(_MASKED, "dim") if self._colour else "« »"
        line = f"marks: {hidden} is context only, not learnt (questions, masked and first tokens); all else is learnt"
        if self._has_classes and self._colour:
            plus, minus = self._in(_CLASSES[1], "class +1"), self._in(_CLASSES[-1], "class -1")
            line += f"; {plus} and {minus} of a Control Adapter"
        elif self._has_classes:
            line += "; each document's header gives its class for a Control Adapter, +1 or -1"
        return line

    def lines(self, dataset: PackedSequences, index: int, number: int) -> Iterator[str]:
        """Yield the lines that show one sequence."""
        item = {name: tensor.tolist() for name, tensor in dataset[index].items()}
        borders, length = dataset.borders(index)
        labels = item["labels"]
        learnt = sum(label != IGNORED for label in labels)
        width = len(labels)
        yield self._in(
            _BOLD,
            f"sequence {number}: {counted(len(borders) + 1, 'document')}, {counted(learnt, 'label')}, {width} tokens",
        )
        edges = [0, *borders.tolist(), length]
        for (begin, end), control_class in zip(itertools.pairwise(edges), dataset.classes(index).tolist(), strict=True):
            told = f", class {control_class:+d}" if self._has_classes else ""
            yield self._in(_CLASSES[control_class], f"── document at {begin}, {counted(end - begin, 'token')}{told}")
            masked = [t == 0 or labels[t - 1] == IGNORED for t in range(begin, end)]
            yield self._text(item["input_ids"][begin:end], masked, _CLASSES[control_class])
        if length < width:
            yield self._in(_PADDING, f"── padding, {counted(width - length, 'token')}")

    def _text(self, ids: list[int], masked: list[bool], colour: str) -> str:
        text = ""
        for hidden, run in itertools.groupby(zip(ids, masked, strict=True), key=lambda pair: pair[1]):
            decoded = self._tokenizer.decode([token for token, _ in run])
            text += self._in(_MASKED if hidden else colour, f"«{decoded}»" if hidden and not self._colour else decoded)
        return text

    def _in(self, colour: str, text: Any) -> str:
        return f"{colour}{text}{_RESET}" if self._colour else str(text)
