"""Whether a class of models runs a document in the same way whatever its length and that of others, found by trial."""

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

LIMIT = 6  # tokens that the tiny model is made for: of two documents, one is longer
DOCUMENTS = (5, 7)
LONGER = 12


@dataclass(frozen=True)
class LongDocuments:
    """What becomes of documents that are longer than the model was made for.

    Attributes:
        apart: Whether each of two packed documents, of which one is that long, has the logits that it has alone.
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
    """Compare packed documents in a tiny model, run as a stage is, with each alone in a fresh one.

    Args:
        config: The real model's configuration.
        build: Builds a model from a configuration.
        takes_positions: Whether its forward is told of documents by ``position_ids``.
        by_document: Names of the modules that run on each document by itself.

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
    except Exception:  # it is the class that runs no longer document
        return LongDocuments(apart=True, forgets=True)
    before = run(stage, documents[1], counts[1])
    run(stage, documents[2], counts[2])
    after = run(stage, documents[1], counts[1]), run(stage, documents[0], counts[0])
    packed = run(stage, torch.cat(documents[:2], dim=1), torch.cat(counts[:2], dim=1)).split(DOCUMENTS, dim=1)
    return LongDocuments(
        apart=equal(packed[0], short) and equal(packed[1], long),
        forgets=equal(before, long) and equal(after[0], long) and equal(after[1], short),
    )
