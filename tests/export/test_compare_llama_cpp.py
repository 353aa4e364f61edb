"""The example that compares llama.cpp with the trained model, with a stand-in for the Python binding."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

import compare_llama_cpp
from export_cases import load, with_adapter, with_control, write_adapter, write_base, write_control_adapter
from tiny_job import write_job


def test_the_trained_models_logits(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "cohere")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    control = write_control_adapter(tmp_path / "control")
    tokens = [5, 17, 99, 3, 64, 21, 8, 90]  # the first row of INPUT_IDS
    found = compare_llama_cpp.trained_logits(str(base), str(adapter), tokens)
    assert torch.allclose(found, with_adapter(base, adapter)[0], atol=1e-6)
    for inverse, sign in ((False, 1), (True, -1)):
        found = compare_llama_cpp.trained_logits(str(base), str(control), tokens, inverse)
        assert torch.allclose(found, with_control(base, control, sign)[0], atol=1e-5)


def test_the_comparison() -> None:
    one = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 2.0, 1.0], [4.0, 1.0, 1.0]])
    assert compare_llama_cpp.compare(one, one) == (0.0, 1.0)
    p, q = one[0].softmax(0), other[0].softmax(0)
    divergence, same = compare_llama_cpp.compare(one, other)
    assert divergence == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    assert same == 0.5


# A stand-in for llama.cpp's Python binding: it returns logits that were stored beside the files and, like llama.cpp,
# crashes on an adapter that it cannot read.
BINDING = """
import os, signal, sys
import numpy


class Llama:
    def __init__(self, path, lora_path, **options):
        print("llama_adapter_lora_init: what is this", file=sys.stderr, flush=True)
        if lora_path and not open(lora_path).read():
            os.kill(os.getpid(), signal.SIGSEGV)
        self.path = lora_path or path

    def eval(self, tokens):
        self.scores = numpy.load(self.path + ".npy")
        assert len(self.scores) == len(tokens)
"""


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_job(tmp_path / "job") / "model"
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])
    (tmp_path / "base.gguf").touch()
    arguments = ["--base", str(base), "--adapter", str(adapter)]
    arguments += ["--base-gguf", str(tmp_path / "base.gguf"), "--adapter-gguf", str(tmp_path / "adapter.gguf")]
    monkeypatch.setattr(sys, "argv", ["compare_llama_cpp.py", *arguments])
    assert compare_llama_cpp.main() == 2
    assert "pip install llama-cpp-python" in capsys.readouterr().err

    (tmp_path / "binding").mkdir()
    (tmp_path / "binding" / "llama_cpp.py").write_text(BINDING)
    monkeypatch.syspath_prepend(str(tmp_path / "binding"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "binding"))
    assert compare_llama_cpp.main() == 2
    assert "adapter.gguf does not exist" in capsys.readouterr().err
    (tmp_path / "adapter.gguf").touch()
    assert compare_llama_cpp.main() == 2
    told = capsys.readouterr().err
    assert "llama.cpp was ended by SIGSEGV on" in told
    assert "last output: llama_adapter_lora_init: what is this" in told

    tokens = AutoTokenizer.from_pretrained(base)(compare_llama_cpp.TEXT).input_ids
    (tmp_path / "adapter.gguf").write_text("to its taste")
    with torch.no_grad():
        for model, name in ((load(base), "base"), (PeftModel.from_pretrained(load(base), adapter).eval(), "adapter")):
            np.save(tmp_path / f"{name}.gguf.npy", model(input_ids=torch.tensor([tokens])).logits[0].numpy())
    assert compare_llama_cpp.main() == 0
    with_it, without = capsys.readouterr().out.splitlines()
    assert "with the adapter: KL divergence 0.00e+00" in with_it
    assert "without it: KL divergence 0.00e+00" not in without
