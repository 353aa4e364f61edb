"""From a jsonl to packed sequences, against the tokenizer alone: speed, memory, and a cached start. Linux only.

    python benchmarks/data.py [--repeats 5] [--write]

The text is what the machine has: the sources and documentation of Python's standard library and of the installed
packages, one document a file. A BPE tokenizer with a vocabulary of 8192 is trained on a part of it.

Speed: both sides get the same two cores and the same jsonl of 30 MB, and every run is a fresh process. The tokenizer's
side has the texts in memory and discards the ids; it runs with its own threads, in batches of 1000, as
``tokenizer(texts)`` and as ``backend_tokenizer.encode_batch_fast(texts)``, the fastest call there is. The faster of the
two counts. The data module's side is all of ``prepare_data()`` with an empty cache: hash and load the tokenizer's
files, read and parse, tokenise, shuffle, split, pack, write, and sync to disk. The sides take turns, and shares are
computed within a turn, so that other load on the machine affects both. CPU time, which is largely independent of that
load, is shown next to the wall time.

Memory: the proportional set size (PSS) of all processes of a build together, sampled every 20 ms from outside. The
larger text repeats the smaller one ten times, each time with different first words.

Exits with 1 if the data module is slower than 0.9 of the tokenizer, if ten times the text takes over 200 MB more
memory, or if its first micro-batch comes more than 1 s after a cached start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil

from report import Report

MEGABYTE = 10**6
SIZE = 30 * MEGABYTE
CORES = 2
SEQUENCE_LEN = 4096
VOCABULARY = 8192
SPEED_LIMIT, MEMORY_LIMIT, START_LIMIT = 0.9, 200 * MEGABYTE, 1.0


def texts() -> Iterator[str]:
    """Yield the documents found on this machine."""
    yield from (topics[name] for name in sorted(topics))
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in (".py", ".rst", ".txt", ".md") and path.is_file() and path.stat().st_size < 200_000:
                with contextlib.suppress(UnicodeDecodeError):
                    yield path.read_text(encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write small.jsonl (30 MB of text), large.jsonl (300 MB) and a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    documents, size = [], 0
    for text in texts():
        if text.strip():
            documents.append(text)
            size += len(text.encode())
        if size >= SIZE:
            break
    else:
        raise SystemExit(f"this machine has only {size / MEGABYTE:.0f} MB of text")
    with (folder / "small.jsonl").open("w", encoding="utf-8") as small:
        small.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    with (folder / "large.jsonl").open("w", encoding="utf-8") as large:
        for copy in range(10):
            large.writelines(json.dumps({"text": f"copy {copy}\n{text}"}) + "\n" for text in documents)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents[::10], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")


# Run in a process of its own


def processor_time() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tokenizer_alone(folder: Path, kind: str, batch: int) -> dict[str, float]:
    """Tokenise the texts of small.jsonl in batches."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with (folder / "small.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]

    def call(texts: list[str]) -> int:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return sum(map(len, encoded["input_ids"]))

    def fast(texts: list[str]) -> int:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings)

    run = call if kind == "call" else fast
    began, used = time.perf_counter(), processor_time()
    tokens = sum(run(documents[first : first + batch]) for first in range(0, len(documents), batch))
    return {"tokens": tokens, "seconds": time.perf_counter() - began, "processor": processor_time() - used}


def pack(folder: Path, name: str, cache: Path) -> dict[str, float]:
    """Run prepare_data() on a jsonl, and fetch the first sequence."""
    from lightning_pipelite.data import DatasetConfig, PackedDataModule

    data = PackedDataModule(
        [DatasetConfig(str(folder / f"{name}.jsonl"))],
        sequence_len=SEQUENCE_LEN,
        tokenizer_dir=str(folder / "tokenizer"),
        cache_dir=str(cache),
    )
    began, used = time.perf_counter(), processor_time()
    data.prepare_data()
    seconds, processor = time.perf_counter() - began, processor_time() - used
    next(iter(data.train_dataloader()))
    assert data.statistics is not None
    tokens = data.statistics.train.tokens + data.statistics.eval.tokens
    first = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "processor": processor, "first": first}


# Run in the measuring process


def in_process(folder: Path, *arguments: Any, watch: Callable[[psutil.Process], None] | None = None) -> dict[str, Any]:
    """Run one of the functions above in a fresh process and return its result."""
    command = [sys.executable, __file__, "--run", json.dumps([str(folder), *map(str, arguments)])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while watch is not None and process.poll() is None:
        watch(psutil.Process(process.pid))
        time.sleep(0.02)
    answer = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return json.loads(answer.splitlines()[-1])


def peak_memory(folder: Path, name: str, cache: Path) -> int:
    """Build into a cache and return the peak of the summed PSS of all its processes, in bytes."""
    peak = 0

    def watch(process: psutil.Process) -> None:
        nonlocal peak
        total = 0
        with contextlib.suppress(psutil.Error, OSError):
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, OSError):
                    rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
                    total += 1024 * int(rollup.split("\nPss:")[1].split()[0])
        peak = max(peak, total)

    in_process(folder, "pack", name, cache, watch=watch)
    return peak


def measure_speed(folder: Path, repeats: int, report: Report) -> float:
    """Run the sides in turns; return the data module's speed as a share of the fastest tokenizer's."""
    sides: dict[str, tuple[Any, ...]] = {
        "`tokenizer(texts)`, batches of 1000": ("tokenizer", "call", 1000),
        "`encode_batch_fast(texts)`, batches of 1000": ("tokenizer", "fast", 1000),
    }
    ours = "`PackedDataModule.prepare_data()`"
    results: dict[str, list[dict[str, float]]] = {name: [] for name in (*sides, ours)}
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(in_process(folder, *side))
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            results[ours].append(in_process(folder, "pack", "small", cache))

    def table(cost: str) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Return each run's tokens a second, and each side's median share over the turns of the fastest tokenizer."""
        speeds = {name: [r["tokens"] / r[cost] for r in each] for name, each in results.items()}
        fastest = max(sides, key=lambda name: statistics.median(speeds[name]))
        turns = {name: [a / b for a, b in zip(each, speeds[fastest], strict=True)] for name, each in speeds.items()}
        return speeds, {name: statistics.median(each) for name, each in turns.items()}

    (speeds, shares), (costs, cost_shares) = table("seconds"), table("processor")
    for name, values in speeds.items():
        report.row(
            f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f} "
            f"| {shares[name]:.0%} | {statistics.median(costs[name]):,.0f} | {cost_shares[name]:.0%} |"
        )
    return shares[ours]


def main() -> int:
    """Measure, print, and return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help=argparse.SUPPRESS)  # for the fresh processes
    parser.add_argument("--repeats", type=int, default=5, help="how often each side runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/data.md")
    options = parser.parse_args()
    if options.run:
        folder, kind, *arguments = json.loads(options.run)
        if kind == "tokenizer":
            print(json.dumps(tokenizer_alone(Path(folder), arguments[0], int(arguments[1]))))
        else:
            print(json.dumps(pack(Path(folder), arguments[0], Path(arguments[1]))))
        return 0

    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_data(folder)
        report = Report(
            "data",
            f"| 30 MB of text, {len(cores)} cores | tokens/s, median of {options.repeats} | least to most | share | "
            "tokens/s of processor time | share |",
            "| --- | --- | --- | --- | --- | --- |",
        )
        share = measure_speed(folder, options.repeats, report)
        cache = folder / "cache"
        small, large = peak_memory(folder, "small", cache), peak_memory(folder, "large", cache)
        again, again_large = in_process(folder, "pack", "small", cache), in_process(folder, "pack", "large", cache)
    report.line(
        f"Peak memory over all processes: {small / MEGABYTE:.0f} MB for 30 MB of text, {large / MEGABYTE:.0f} MB for "
        f"300 MB: {(large - small) / MEGABYTE:+.0f} MB (limit {MEMORY_LIMIT / MEGABYTE:.0f})."
    )
    report.line(
        f"A cached start, after the imports: {again['seconds']:.3f} s to open, {again['first']:.3f} s to the first "
        f"micro-batch; with 300 MB {again_large['seconds']:.3f} s and {again_large['first']:.3f} s (limit "
        f"{START_LIMIT:g} s)."
    )
    missed = share < SPEED_LIMIT or large - small > MEMORY_LIMIT or again_large["first"] > START_LIMIT
    report.line("A LIMIT IS MISSED" if missed else f"Speed is {share:.0%} of the fastest tokenizer's (limit 90 %).")
    if options.write:
        report.write()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
