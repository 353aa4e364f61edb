"""Compares next-token probabilities of an adapter in llama.cpp with those of the trained model, on the same text.

    pipelite export-gguf --adapter DIR --base DIR --output adapter.gguf
    python examples/compare_llama_cpp.py --base DIR --adapter DIR --base-gguf base.gguf --adapter-gguf adapter.gguf

Convert the base to GGUF with llama.cpp's convert_hf_to_gguf.py (--outtype f32 for a close comparison). This needs
llama.cpp's Python binding: pip install llama-cpp-python. The adapter is a LoRA or a Control Adapter; the latter is run
here as the LoRA that control-to-lora makes from it, which is also what its GGUF file holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pipelite.adapters.control_files import is_control_adapter
from lightning_pipelite.adapters.lora_kinds import check_tensors, read_lora_config
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import control_to_lora

LAST_WORDS = 5  # lines of llama.cpp's output
TEXT = "Python is an easy to learn, powerful programming language. It has efficient high-level data structures."


@torch.no_grad()
def trained_logits(base: str, adapter: str, tokens: list[int], inverse: bool = False) -> Tensor:
    """Return the logits [tokens, vocabulary] of the base with its adapter, using transformers and PEFT."""
    if is_control_adapter(adapter):
        with tempfile.TemporaryDirectory() as directory:
            control_to_lora(base, adapter, f"{directory}/lora", inverse)
            return trained_logits(base, f"{directory}/lora", tokens)
    check_tensors(read_lora_config(Path(adapter)), read_tensors(Path(adapter)), Path(adapter))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits: Tensor = PeftModel.from_pretrained(model, adapter).eval()(input_ids=torch.tensor([tokens])).logits[0]
    return logits


# Run in a separate process, because llama.cpp may crash on a file that it cannot load, by a signal and silently.
LLAMA = """
import sys
import numpy
from llama_cpp import Llama
base, adapter, output, *tokens = sys.argv[1:]
tokens = [int(token) for token in tokens]
llama = Llama(base, lora_path=adapter or None, logits_all=True, n_ctx=len(tokens) + 8, n_gpu_layers=0, verbose=True)
llama.eval(tokens)
numpy.save(output, numpy.array(llama.scores[: len(tokens)]))
"""


def llama_logits(base_gguf: str, adapter_gguf: str | None, tokens: list[int]) -> Tensor:
    """Return the same logits from llama.cpp.

    Raises:
        RuntimeError: llama.cpp failed; the message has its last lines of output.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = f"{directory}/logits.npy"
        command = [sys.executable, "-c", LLAMA, base_gguf, adapter_gguf or "", output, *map(str, tokens)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == 0:
            return torch.from_numpy(np.load(output))
    code = done.returncode
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()][-LAST_WORDS:]
    what = f"{base_gguf} with {adapter_gguf}" if adapter_gguf else base_gguf
    raise RuntimeError(f"llama.cpp {ended} on {what}; its last output: {' / '.join(words) or 'none'}.")


def compare(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the mean Kullback-Leibler divergence in nats, and the share of positions with the same first token."""
    one, other = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = float((one.exp() * (one - other)).sum(-1).mean())
    return divergence, float((one.argmax(-1) == other.argmax(-1)).double().mean())


def main() -> int:
    """Print the comparison with the adapter, and without it as a reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--adapter", "--base-gguf", "--adapter-gguf"):
        parser.add_argument(name, required=True)
    parser.add_argument("--inverse", action="store_true", help="class -1 of a Control Adapter")
    parser.add_argument("--text", default=TEXT)
    options = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp's Python binding is missing; pip install llama-cpp-python.", file=sys.stderr)
        return 2
    for path in (options.base_gguf, options.adapter_gguf):
        if not Path(path).is_file():
            print(f"{path} does not exist; see --help for how to make it.", file=sys.stderr)
            return 2
    tokens = AutoTokenizer.from_pretrained(options.base)(options.text).input_ids
    try:
        wanted = trained_logits(options.base, options.adapter, tokens, options.inverse)
        for told, adapter in (("with the adapter", options.adapter_gguf), ("without it", None)):
            divergence, same = compare(wanted, llama_logits(options.base_gguf, adapter, tokens))
            print(f"llama.cpp {told}: KL divergence {divergence:.2e} nats per token, same top token in {same:.0%}")
    except (ConfigurationError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
