"""Finds by trial whether a class of models runs a document alike, whatever its length and that of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightning_pipelite.models.attention.by_document import run_by_document
from lightning_pipelite.models.attention.document_mask import document_mask
from lightning_pipelite.models.probe import equal
from lightning_pipelite.models.rope import follow_documents
from lightning_pipelite.models.tiny import build_tiny

LIMIT = 6  # tokens that the tiny model is made for; one of the two documents is longer
DOCUMENTS = (5, 7)
LONGER = 12


@dataclass(frozen=True)
class LongDocuments:
    """How a model treats documents that are longer than it was made for.

    Attributes:
        apart: Whether each of two packed documents, one of them that long, has the same logits as alone.
        forgets: Whether a document has the same logits before and after a longer one.
    """

    apart: bool
    forgets: bool


@torch.no_grad()
def try_long_documents(
    config: PretrainedConfig,
    build: Callable[..., PreTrainedModel],
    *,
    takes_positions: bool,
    by_document: Sequence[str] = (),
) -> LongDocuments:
    """Compare packed documents in a tiny model, run like a stage, with each document alone in a fresh model.

    Args:
        config: The real model's configuration.
        build: Builds a model from a configuration.
        takes_positions: Whether documents are passed to its forward as ``position_ids``.
        by_document: Names of the modules that run on each document separately.

    Raises:
        Exception: Whatever the class raises on a document that is short enough.
    """
    fresh = build_tiny(config, build, limit=LIMIT).eval()
    stage = copy.deepcopy(fresh)
    follow_documents(stage)
    run_by_document(stage, by_document)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 120, (1, length), generator=generator) for length in (*DOCUMENTS, LONGER)]
    counts = [torch.arange(ids.shape[1])[None] for ids in documents]

    def run(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        given = {"position_ids": position_ids} if takes_positions else {}
        with document_mask(position_ids):
            logits: Tensor = model(input_ids=input_ids, use_cache=False, **given).logits
        return logits

    short = run(copy.deepcopy(fresh), documents[0], counts[0])
    try:
        long = run(copy.deepcopy(fresh), documents[1], counts[1])
    except Exception:  # the class itself does not support longer documents
        return LongDocuments(apart=True, forgets=True)
    before = run(stage, documents[1], counts[1])
    run(stage, documents[2], counts[2])
    after = run(stage, documents[1], counts[1]), run(stage, documents[0], counts[0])
    packed = run(stage, torch.cat(documents[:2], dim=1), torch.cat(counts[:2], dim=1)).split(DOCUMENTS, dim=1)
    return LongDocuments(
        apart=equal(packed[0], short) and equal(packed[1], long),
        forgets=equal(before, long) and equal(after[0], long) and equal(after[1], short),
    )
