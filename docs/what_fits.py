"""Writes the tables of docs/will-it-fit.md: which bases train on which cards, according to ``pipelite plan``.

python docs/what_fits.py
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.cli.plan_command import simulate
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.gpus import GIB, GPUS, REFERENCE
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.report import in_three_digits
from lightning_pipelite.planning.settings import settings_of
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.stages import step

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "will-it-fit.md"
BEGIN, END = "<!-- made by what_fits.py: begin -->", "<!-- end -->"
TOKENS, SEQUENCES = 2048, 16
COUNTS = (1, 2, 4, 8)
MODES = {"bf16": "lora", "4 bits": "qlora"}
"""Formats of the frozen weights, the heaviest first, and the configurations that use them."""


@dataclass(frozen=True)
class Card:
    """A size of card.

    Attributes:
        sold: Its nominal size in GB.
        gpu: Short name of the GPU whose memory and speed are used; None if the table of GPUs has none of this size.
        gib: GiB that torch reports at least, for sizes without ``gpu``.
    """

    sold: int
    gpu: str | None = None
    gib: float = 0.0

    @property
    def memory(self) -> int:
        """Its memory in bytes."""
        return GPUS[self.gpu].memory if self.gpu else int(self.gib * GIB)


CARDS = [Card(24, "4090"), Card(12, gib=11.6), Card(16, gib=15.5), Card(48, "l40s"), Card(80, "h100")]

LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False}  # fmt: skip
GEMMA = {"model_type": "gemma3_text", "vocab_size": 262_208, "sliding_window": 1024}


def _sizes(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 32_768,
    }


BASES: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": {**LLAMA, **_sizes(2048, 8192, 16, 32), "tie_word_embeddings": True},
    "Llama 3.2 3B": {**LLAMA, **_sizes(3072, 8192, 28, 24), "tie_word_embeddings": True},
    "Qwen3 4B": {**QWEN, **_sizes(2560, 9728, 36, 32), "tie_word_embeddings": True},
    "Llama 3.1 8B": {**LLAMA, **_sizes(4096, 14_336, 32, 32)},
    "Qwen3 8B": {**QWEN, **_sizes(4096, 12_288, 36, 32)},
    "Gemma 3 12B": {**GEMMA, **_sizes(3840, 15_360, 48, 16), "num_key_value_heads": 8, "head_dim": 256},
    "Qwen3 14B": {**QWEN, **_sizes(5120, 17_408, 40, 40)},
    "gpt-oss 20B": {"model_type": "gpt_oss", "vocab_size": 201_088, **_sizes(2880, 2880, 24, 64), "head_dim": 64,
                    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4},
    "Mistral Small 24B": {**LLAMA, "model_type": "mistral", "vocab_size": 131_072, **_sizes(5120, 32_768, 40, 32),
                          "head_dim": 128, "sliding_window": None},
    "Gemma 3 27B": {**GEMMA, **_sizes(5376, 21_504, 62, 32), "num_key_value_heads": 16, "head_dim": 128},
    "Qwen3 30B-A3B": {**QWEN, "model_type": "qwen3_moe", **_sizes(2048, 6144, 48, 32), "num_key_value_heads": 4,
                      "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                      "norm_topk_prob": True},
    "Qwen3 32B": {**QWEN, **_sizes(5120, 25_600, 64, 64)},
    "Llama 3.3 70B": {**LLAMA, **_sizes(8192, 28_672, 80, 64)},
}  # fmt: skip
"""The sizes from their config.json files."""


def words(mode: str, model_dir: str, count: int) -> list[str]:
    """Return a cell's options as command-line arguments, with equal sequences per step for any number of cards."""
    return [
        *("--config", str(ROOT / "configs" / f"{MODES[mode]}.yaml"), "--model.model_dir", model_dir),
        *("--data.sequence_len", str(TOKENS), "--trainer.devices", str(count)),
        *("--trainer.accumulate_grad_batches", str(SEQUENCES // count)),
    ]


def simulations(base: str, directory: str) -> dict[str, Simulation]:
    """Return a simulation for each mode of what the layers take, to be used for all cards.

    Args:
        base: Name of the base.
        directory: Directory to write its config.json to.
    """
    (Path(directory) / "config.json").write_text(json.dumps(BASES[base]))
    read = {mode: Configuration(tuple(words(mode, directory, 1))).read() for mode in MODES}
    return {mode: simulate(settings_of(content, mode)) for mode, content in read.items()}


def row(base: str, modes: dict[str, Simulation], card: Card) -> str:
    """Return a base's row in the table of a card size."""
    return f"| {base} | {' | '.join(_cell(modes, card, count) for count in COUNTS)} |"


def _cell(modes: dict[str, Simulation], card: Card, count: int) -> str:
    """Return the heaviest mode that fits, its fastest number of stages, and its tokens per second."""
    for mode, simulation in modes.items():
        simulation.gpu = GPUS[card.gpu] if card.gpu else REFERENCE
        devices = Devices.alike(count, card.memory)
        planner = Planner(simulation, micro_batches=SEQUENCES // count, sequence_len=TOKENS, devices=devices)
        if times := _times(planner):
            seconds, stages = min(times)
            where = f", {stages} stages" if stages > 1 else ""
            speed = f": {in_three_digits(SEQUENCES * TOKENS / seconds)}" if card.gpu else ""
            return f"{mode}{where}{speed}"
    return "-"


def _times(planner: Planner) -> list[tuple[float, int]]:
    """Return the seconds per step and the number of stages of every setup that fits, as the plan lists them.

    Virtual stages are left out, because searching for their cuts takes minutes for large models.
    """
    times = []
    for stages in planner.stage_counts(SEQUENCES):
        each = planner.of(SEQUENCES * stages // planner.devices.count)
        for policy in each.policies:
            split = each.stages(each.split(stages, "auto", policy), policy)
            if each.fits(split):
                times.append((step(split, each.micro_batches).seconds, stages))
    return times


def tables() -> str:
    """Return a table for each card size."""
    rows: dict[int, list[str]] = {card.sold: [] for card in CARDS}
    with tempfile.TemporaryDirectory() as directory:
        for base in BASES:
            modes = simulations(base, directory)
            for card in CARDS:
                rows[card.sold].append(row(base, modes, card))
            print(rows[CARDS[0].sold][-1], file=sys.stderr)
    return "\n\n".join("\n".join([heading(card), "", *head(), *rows[card.sold]]) for card in CARDS)


def heading(card: Card) -> str:
    """Return the heading of the table of a card size."""
    told = f"{GPUS[card.gpu].name}, tokens/s" if card.gpu else "what fits"
    return f"### {card.sold} GB: {told}"


def head() -> list[str]:
    """Return the header rows of every table."""
    names = [f"{count} card{'s' * (count > 1)}" for count in COUNTS]
    return [f"| base | {' | '.join(names)} |", f"| --- | {' | '.join('---' for _ in COUNTS)} |"]


def main() -> None:
    """Write the tables into the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
