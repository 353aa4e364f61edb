"""``pipelite check``: whether a model trains as a pipeline exactly as it does unsplit."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lightning_pipelite.cli.command_options import Split, read_splits
from lightning_pipelite.cli.split_comparison import (
    compare_packed,
    compare_split,
    even_cuts,
    exact_layers,
    in_words,
    pieces_of,
)
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.companions import copy_to, own_code
from lightning_pipelite.models.loading import load_dequantised
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.planning.settings import gib
from lightning_pipelite.strategy.option_ranges import check_virtual_stages

TAKEN = 4 * 4
"""Bytes per weight: float32 weights and gradients, of both the model and its stages."""


@dataclass
class CheckReport:
    """What :func:`check_model` found.

    Attributes:
        stage_bytes: For each split, the bytes of each stage's weights in bfloat16.
        differences: Differences between the split and the unsplit model, one sentence each; empty if there are none.
        packing: Whether packed documents are kept apart; if not, train with ``packed: false``.
    """

    stage_bytes: dict[Split, list[int]]
    differences: list[str]
    packing: bool

    def __str__(self) -> str:
        lines = [
            f"{in_words(split)}: {', '.join(f'{size / 1e9:.2f} GB' for size in sizes)}"
            for split, sizes in self.stage_bytes.items()
        ]
        lines += self.differences or ["The split and the unsplit model agree in weights, logits and every gradient."]
        lines.append(
            "Packed documents give the same logits as each document alone."
            if self.packing
            else "This model cannot keep packed documents apart: set packed to false."
        )
        return "\n".join(lines)


def check_model(
    model_dir: str | Path, stages: Sequence[Split] = (1, 2, 4), *, tiny: bool = False, trust_remote_code: bool = False
) -> CheckReport:
    """Compare a model split into stages with the same model unsplit, on the CPU in float32.

    A tiny model that differs in float32 is compared again in float64.

    Args:
        model_dir: Directory of a Hugging Face causal LM.
        stages: Numbers of stages to try, or pairs of a number of stages and a number of pieces per stage.
        tiny: Try a tiny random model of the same class and depth; the weights of ``model_dir`` are then not read.
        trust_remote_code: Run the model's own code, if it has any.

    Raises:
        ConfigurationError: The model is refused, does not fit in memory, or has fewer items than a split has pieces.
    """
    meta_model = MetaModel(model_dir, trust_remote_code=trust_remote_code)
    items = len(meta_model.groups) - 1
    if meta_model.one_stage_only and set(stages) != {1}:
        raise ConfigurationError(
            f"{model_dir}: a model of type {meta_model.config.model_type} trains in one stage only because "
            f"{meta_model.one_stage_only}; set stages to 1."
        )
    for split in stages:
        if not 1 <= (count := pieces_of(split)) <= items:
            raise ConfigurationError(
                f"stages: {count} is not between 1 and {items}, the most pieces that {model_dir} can be split into."
            )
        if isinstance(split, tuple):
            check_virtual_stages(*split)
    if not tiny:
        _check_memory(meta_model)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(model_dir)
        if tiny:
            directory = Path(temporary)
            meta_model.tiny().save_pretrained(directory)
            copy_to(directory, meta_model.model_dir, own_code(meta_model.model_dir))
        packed = meta_model.isolates_documents
        compare = partial(_differences, directory, stages, packed=packed, trust_remote_code=trust_remote_code)
        differences = compare(torch.float32)
        if differences and tiny:  # rounding errors grow with depth, and should vanish in float64
            with contextlib.suppress(RuntimeError):  # some classes keep parts in float32 regardless of dtype
                differences = compare(torch.float64)
    sizes = meta_model.parameter_counts()
    stage_bytes: dict[Split, list[int]] = {}
    for split in stages:
        cuts = itertools.pairwise(even_cuts(items, pieces_of(split)))
        pieces = [2 * sum(sizes[start:stop]) for start, stop in cuts]
        number = split if isinstance(split, int) else split[0]
        stage_bytes[split] = [sum(pieces[stage::number]) for stage in range(number)]
        if meta_model.tied and number == 1:  # a single stage holds both ends, and their tied weight once
            stage_bytes[split][0] -= 2 * meta_model.model.get_submodule(meta_model.head_name).weight.numel()
    return CheckReport(stage_bytes, differences, packed)


def _differences(
    directory: Path, stages: Sequence[Split], dtype: torch.dtype, *, packed: bool, trust_remote_code: bool
) -> list[str]:
    layers = exact_layers(directory, packed=packed, trust_remote_code=trust_remote_code, dtype=dtype)
    whole = _whole(layers.meta_model, dtype)
    return compare_split(layers, whole, stages) + (compare_packed(layers, whole) if packed else [])


def _whole(meta_model: MetaModel, dtype: torch.dtype) -> PreTrainedModel:
    options = {"config": meta_model.config, "dtype": dtype, "key_mapping": meta_model.key_mapping}
    if meta_model.stored is not None:
        weights = StoredWeights(meta_model.model_dir, meta_model.stored)
        return load_dequantised(type(meta_model.model), weights, **options)
    model: PreTrainedModel = meta_model.auto.from_pretrained(
        meta_model.model_dir, trust_remote_code=meta_model.trust_remote_code, **options
    )
    return model


def check(model_dir: str, stages: str = "1,2,4", tiny: bool = False, trust_remote_code: bool = False) -> CheckReport:
    """Compare a model split into stages with the same model unsplit, on the CPU in float32.

    The exit status is 1 if they differ.

    Args:
        model_dir: Directory of a Hugging Face causal LM.
        stages: Numbers of stages to try; 2x4 means two stages of four pieces each (virtual_stages).
        tiny: Check a tiny random model of the same class and depth, without reading the weights of MODEL_DIR.
        trust_remote_code: Run the model's own Python code, if it has any.
    """
    counts = read_splits(stages)
    disable_progress_bar()  # one bar per stage of each split would be noise
    report = check_model(model_dir, counts, tiny=tiny, trust_remote_code=trust_remote_code)
    if report.differences:
        print(report, flush=True)
        sys.exit(1)
    return report


def _check_memory(meta_model: MetaModel) -> None:
    """Refuse a model that would run out of memory only after minutes of loading."""
    weights = sum(parameter.numel() for parameter in meta_model.model.parameters())
    needed, free = TAKEN * weights, psutil.virtual_memory().available
    if needed > free:
        raise ConfigurationError(
            f"{meta_model.model_dir}: checking the whole model would take about {gib(needed)} of this machine's memory "
            f"(float32 weights and gradients of both the model and its stages), but only {gib(free)} is free; give "
            "--tiny to check a small model of the same class and depth."
        )
