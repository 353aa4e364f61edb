"""The memory that loading 4-bit experts takes beyond what stays allocated. Linux only.

    python tests/support/expert_memory.py DIRECTORY

Loads the Mixtral in DIRECTORY, in this process, and prints what :func:`load_experts` returns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

from lightning_pipelite.adapters import Adapter
from lightning_pipelite.models import CausalLMLayers, MetaModel
from peak_memory import PeakWatcher, memory

EXPERTS, HIDDEN, INNER = 8, 512, 1024


class Untrained(Adapter):
    """Trains nothing: the weights are compared as they are loaded."""

    @override
    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        pass

    @override
    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        model.requires_grad_(False)

    @override
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {}

    @override
    def place(self, directory: Path, meta_model: MetaModel) -> AbstractContextManager[Path]:
        raise NotImplementedError("nothing is trained")

    @override
    def write(self, directory: Path, states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> None:
        raise NotImplementedError("nothing is trained")


def write_experts(directory: Path, depth: int) -> None:
    """Write a bfloat16 Mixtral that consists mostly of experts."""
    config = MixtralConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=depth, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=EXPERTS,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def load_experts(directory: Path) -> float:
    """Load all layers in this process; return the peak beyond what stays, in units of one layer's experts.

    Loads in float32, not in the files' dtype, so that what is read is copied, as when it goes to a GPU.
    """
    layers = CausalLMLayers(directory, dtype=torch.float32, load_in_4bit=True, adapter=Untrained())
    with PeakWatcher(0.0005) as watcher:
        stage = layers.build_stage(0, len(layers), torch.device("cpu"))
    beside = watcher.peak - memory("RssAnon")
    del stage
    return beside / (4 * EXPERTS * 3 * HIDDEN * INNER)


def measure_peak(depth: int) -> float:
    """Call :func:`load_experts` in a fresh process."""
    with tempfile.TemporaryDirectory() as directory:
        write_experts(Path(directory), depth)
        # Freed blocks return to the system at once, so that resident memory is memory in use (mallopt(3)).
        command = ["env", "MALLOC_MMAP_THRESHOLD_=65536", sys.executable, __file__, directory]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(answer.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print(json.dumps(load_experts(Path(sys.argv[1]))))
