"""The steps of benchmarks/step.py in Unsloth; called by it, in a process of its own.

    python benchmarks/unsloth_step.py JOB

Unsloth patches transformers when it is imported, and must be imported first, so nothing else runs in this process. JOB
is a JSON file: the model's directory, the file of micro-batches, the target modules, and whether to load in 4 bits.
Prints the losses, the seconds of each step and the peak in GiB as JSON. The adapter's initial values are PEFT's own
random ones.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANK, LR = 16, 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def is_installed() -> bool:
    return importlib.util.find_spec("unsloth") is not None


def run_unsloth(
    directory: str, batches: list[dict[str, Any]], *, attention_alone: bool, in_4bit: bool
) -> dict[str, Any]:
    """Train in a fresh process; return ``losses``, ``seconds`` and ``gib``."""
    import torch

    write_tokenizer(Path(directory))
    tokens = Path(directory).with_name("micro_batches.pt")
    torch.save([(batch["input_ids"], batch["labels"]) for batch in batches], tokens)
    job = Path(directory).with_name("unsloth.json")
    job.write_text(
        json.dumps(
            {
                "directory": directory,
                "tokens": str(tokens),
                "target_modules": ATTENTION if attention_alone else ALL_LINEAR,
                "in_4bit": in_4bit,
            }
        )
    )
    environment = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    answer = subprocess.run(
        [sys.executable, __file__, str(job)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(answer.stdout.splitlines()[-1])


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer that Unsloth can load; it tokenises nothing."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def train(job: dict[str, Any]) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # isort: skip  # before torch and transformers are used
    import torch
    from optimi import Adam

    micro_batches = 4
    batches = torch.load(job["tokens"])
    length = batches[0][0].shape[1]
    model, _ = FastLanguageModel.from_pretrained(
        job["directory"], max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=job["in_4bit"]
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", target_modules=job["target_modules"],
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(sum(p.numel() for p in trained), "trained", {str(p.dtype) for p in trained}, file=sys.stderr)
    optimizer: Any = Adam(trained, LR, betas=(0.9, 0.99), eps=1e-6)
    torch.cuda.empty_cache()
    losses, seconds = [], []
    began = time.perf_counter()
    for start in range(0, len(batches), micro_batches):
        total = torch.zeros((), device="cuda")
        for input_ids, _ in batches[start : start + micro_batches]:
            ids = input_ids.to("cuda", non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / micro_batches  # transformers shifts the labels itself
            total += loss.detach()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        ended = time.perf_counter()
        seconds.append(ended - began)
        began = ended
    return {"losses": losses, "seconds": seconds, "gib": torch.cuda.max_memory_allocated() / 2**30}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Unsloth prints to stdout
        answer = train(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(answer))
