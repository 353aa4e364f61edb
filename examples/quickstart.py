"""The quickstart: from scratch to a fine-tuned model, in a few minutes, on the hardware at hand.

    python examples/quickstart.py [DIRECTORY] [--steps N]

Nothing is downloaded: the text is Python's own documentation, which every machine has. First a tokenizer and a small
Llama, from random weights, are trained on the documentation of the standard library. Then a LoRA is trained on top of
it, on Python's language reference, in two pipeline stages: two processes, or two GPUs if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pydoc
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from lightning_pipelite.export.generation import generate
from lightning_pipelite.shared.verbosity import be_quiet

ROOT = Path(__file__).resolve().parent.parent
# Modules of the standard library with long documentation and no side effects on import.
MODULES = """
argparse array ast asyncio base64 bz2 calendar cmath cmd collections configparser contextlib copy csv ctypes
dataclasses datetime decimal difflib dis doctest email enum fileinput fractions functools gc glob gzip hashlib heapq
html imaplib inspect io ipaddress itertools json linecache locale logging lzma mailbox math multiprocessing numbers
operator optparse os pathlib pdb pickle plistlib pprint profile pstats queue random re sched select shelve
shlex shutil signal smtplib socket socketserver sqlite3 ssl statistics string struct subprocess tarfile tempfile
textwrap threading timeit tokenize trace traceback types typing unittest urllib uuid warnings weakref zipfile zlib
"""


def write_texts(directory: Path) -> None:
    """Write the documentation of the standard library and the language reference, one text file per module or topic."""
    base, reference = directory / "texts" / "library", directory / "texts" / "reference"
    for folder in (base, reference):
        folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES.split():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):  # some may be missing
            text = pydoc.plain(pydoc.render_doc(importlib.import_module(name)))
            text = re.sub(r"\b0x[0-9a-f]+", "0x0", text)[:24_000]  # no addresses, so that the texts are reproducible
            (base / f"{name}.txt").write_text(text, encoding="utf-8")
    from pydoc_data.topics import topics

    for name, text in topics.items():
        (reference / f"{name}.txt").write_text(text, encoding="utf-8")


def make_base_model(directory: Path) -> Path:
    """Write a BPE tokenizer trained on the texts, and a small Llama with random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # for saving a few megabytes
    target = directory / "random"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(path) for path in sorted((directory / "texts" / "library").glob("*.txt"))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(target)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def fit(config: str, directory: Path, steps: int) -> None:
    """Run `pipelite fit` with one of the configurations, on GPUs if there are any, replacing earlier results."""
    command = [sys.executable, "-m", "lightning_pipelite", "fit", "--config", str(ROOT / "configs" / config)]
    command += ["--overwrite"]
    if gpus := min(torch.cuda.device_count(), 2):
        command += [f"--trainer.devices={gpus}", "--trainer.accelerator=gpu"]
        if config == "quickstart.yaml":
            command += [f"--trainer.strategy.init_args.pipeline_stages={gpus}"]
    if steps >= 0:
        command += [f"--trainer.max_steps={steps}", f"--model.warmup_steps={min(5, steps)}"]
    print(f"\n$ pipelite {' '.join(command[3:])}", flush=True)
    subprocess.run(command, check=True, cwd=directory)


def eval_losses(logs: Path) -> list[float]:
    """Return the evaluation losses of the newest run, read from its TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(logs.glob("version_*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(newest)).Reload()
    return [event.value for event in events.Scalars("eval/loss")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default="quickstart", help="where everything is written")
    parser.add_argument("--steps", type=int, default=-1, help="stop each training after this many optimizer steps")
    arguments = parser.parse_args()
    started, directory = time.monotonic(), arguments.directory.resolve()
    be_quiet()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    write_texts(directory)
    make_base_model(directory)
    fit("quickstart_base.yaml", directory, arguments.steps)
    fit("quickstart.yaml", directory, arguments.steps)
    losses = eval_losses(directory / "logs" / "lora")
    print("\nText from both (the model is small and was trained for minutes):", flush=True)
    print(
        generate(
            str(directory / "base"), str(directory / "adapter"), "The statement", max_new_tokens=40, temperature=0.8
        ),
        flush=True,
    )
    shown = os.path.relpath(directory)
    print(f"""
evaluation loss before training: {losses[0]:.4f}
evaluation loss after training:  {losses[-1]:.4f}
the adapter, a PEFT directory:   {shown}/adapter
{time.monotonic() - started:.0f} s in all

Next, from here (the commands printed by fit are for the folder {shown}):
    source .venv/bin/activate
    pipelite generate --model_dir {shown}/base --adapter {shown}/adapter --prompt "A class is" --temperature 0.8
    pipelite merge --model_dir {shown}/base --adapter {shown}/adapter --output {shown}/merged
    pipelite export-gguf --help                      # for llama.cpp
    tensorboard --logdir {shown}/logs                # the curves""")


if __name__ == "__main__":
    main()
