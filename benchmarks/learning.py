"""What thirty steps of each shipped configuration change, on a megabyte of real text with the quickstart's base.

    python benchmarks/learning.py [DIRECTORY] [--only NAME] [--lr RATE] [--write]

DIRECTORY is what `make quickstart` has made. The base has read the documentation of the standard library; the text here
is new to it: the library's own source files, cut into documents of 4000 characters, and for a Control Adapter beside
them (class -1) Python's language reference (class +1). Options that only differ in the hardware they are for (devices,
stages, the type of the weights) are those of a CPU, a step has eight sequences of 256 tokens, and evaluation is on what
`eval_fraction` holds out. Exits with 1 unless the evaluation loss falls by at least 3 % in each configuration but that
of Control Adapters, which only stretch what each layer adds along a few directions: theirs is the mean over both
classes, each text read with its own, is printed, and has no limit.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import yaml  # type: ignore[import-untyped]

from report import Report

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("lora", "qlora", "qlora_four_gpus", "control_adapter", "full", "continued_pretraining")
BYTES = 1_000_000
DOCUMENT = 4000
LEAST = dict.fromkeys(NAMES, 3.0) | {"control_adapter": -math.inf}  # per cent


def write_texts(folder: Path) -> None:
    """Write a megabyte of source code, and the language reference."""
    left = BYTES
    (folder / "texts").mkdir(parents=True)
    (folder / "reference").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")[: 10 * DOCUMENT]
        for number in range(0, min(len(text), left), DOCUMENT):
            (folder / "texts" / f"{path.stem}-{number}.txt").write_text(text[number : number + DOCUMENT])
        left -= len(text)
        if left <= 0:
            break
    for name, text in topics.items():
        for number in range(0, len(text), DOCUMENT):
            (folder / "reference" / f"{name}-{number}.txt").write_text(text[number : number + DOCUMENT])


def configuration(name: str, folder: Path, base: Path, steps: int, rate: float | None) -> dict:
    """A shipped configuration, with what a CPU needs."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    trainer, model, data = config["trainer"], config["model"], config["data"]
    trainer |= {"accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": 8}
    trainer |= {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 0, "limit_val_batches": 24}
    trainer["strategy"]["init_args"]["pipeline_stages"] = 1
    kept = ("CompositeWeightDecay", "EvalSchedule")
    trainer["callbacks"] = [each for each in trainer["callbacks"] if each["class_path"].rpartition(".")[2] in kept]
    for each in trainer["callbacks"]:
        if each["class_path"].endswith("EvalSchedule"):
            each["init_args"] = {"evals_per_epoch": 1}  # before the first step and after the last
    model |= {"model_dir": str(base), "dtype": "float32", "activation_memory": "keep"}
    if rate is not None:
        model["lr"] = rate
    data |= {"sequence_len": 256, "cache_dir": str(folder / "cache"), "eval_fraction": 0.01}
    texts = str(folder / "texts" / "*.txt")
    if name == "control_adapter":
        data["datasets"] = [
            {"dataset_path": str(folder / "reference" / "*.txt"), "control_class": 1},
            {"dataset_path": texts, "control_class": -1},
        ]
        data["mix_datasets"] = True
    else:
        data["datasets"] = [{"dataset_path": texts}]
    return config


def losses(config: dict, folder: Path) -> list[float]:
    """The evaluation losses before and after."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lightning_pipelite", "fit", "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [float(loss) for loss in re.findall(r"step \d+: eval/loss (\d+\.\d+)", done.stdout + done.stderr)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default="quickstart")
    parser.add_argument("--only", choices=NAMES, nargs="*", default=NAMES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, help="a learning rate in place of the configurations'")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    base = (arguments.directory / "base").resolve()
    report = Report(
        "learning",
        "| configuration | learning rate | eval/loss before | after | change |",
        "| --- | --- | --- | --- | --- |",
    )
    short = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(folder)
        for name in arguments.only:
            config = configuration(name, folder, base, arguments.steps, arguments.lr)
            first, *_, last = losses(config, folder)
            change = 100 * (last / first - 1)
            report.row(f"| {name} | {config['model']['lr']:g} | {first:.4f} | {last:.4f} | {change:+.1f} % |")
            if change > -LEAST[name]:
                short.append(name)
    report.line(
        f"{arguments.steps} steps of 8 sequences of 256 tokens. "
        + (f"Short of what was to be shown: {', '.join(short)}" if short else "Each as it should be")
    )
    if arguments.write:
        report.write()
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
