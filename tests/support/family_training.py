"""Training of a family in two stages, and in a plain loop that runs each packed document separately."""

from __future__ import annotations

import tempfile
from pathlib import Path

from exact_comparison import compare_with_plain
from exact_training import LOSS_LIMIT, Case, Scale, Split
from processes import Workers
from tiny_families import LAYERS, tiny, write

# PEFT mistakes the names in DeepSeek's dense layers for the experts', so there only attention is adapted.
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
TWO_STAGES = Split(2)
SCALE = Scale(vocabulary=120, layers=LAYERS, sequence=32, sequences=43)


def modes(model_type: str) -> tuple[Case, Case]:
    """Return the ways to train a family."""
    return Case("full", full=True), Case("LoRA", targets=LATENT if model_type == "deepseek_v3" else ())


def try_family(
    workers: Workers, model_type: str, case: Case, steps: int, split: Split = TWO_STAGES
) -> tuple[float, float]:
    """Train a family in one way in two processes; return the largest difference of a loss and of a weight.

    Raises:
        AssertionError: If the loss does not move, or the weights have other names.
        RuntimeError: What a process raised.
    """
    with tempfile.TemporaryDirectory() as directory:
        write(tiny(model_type), Path(directory))
        (_, loss, weight), *_ = compare_with_plain(
            workers, case, directory, [split], steps, SCALE, alone=True, moves=100 * LOSS_LIMIT
        )
        return loss, weight
