"""A small version of benchmarks/fp8_quality.py, with the steps of FP8 products run in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_pipelite.models.quantization import fp8
from small_language_model import TINY, base_text, other_text, tokenise, train_base, train_lora
from tiny_models import CPU

torch.set_num_threads(1)


def test_a_lora_on_fp8_learns_as_one_on_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    base, other = tokenise(TINY, base_text(TINY), other_text(TINY))
    learned = train_base(TINY, base, tmp_path, CPU)
    assert learned < 4.5  # 5.77 before training
    first, wanted = train_lora(TINY, other, tmp_path, CPU, 0)
    before, found = train_lora(TINY, other, tmp_path, CPU, 0, load_in_fp8=True)
    assert first - wanted > 0.03
    assert before != first
    assert abs(found - wanted) < min(3e-3 * wanted, 0.2 * (first - wanted))
