"""How much thirty steps of each shipped configuration learn, on a megabyte of real text with the quickstart's base.

    python benchmarks/learning.py [DIRECTORY] [--only NAME] [--lr RATE] [--write]

DIRECTORY is what `make quickstart` has made (always the same on one machine; another Python makes another one). The
base was trained on the documentation of the standard library. The text here is new to it: the library's own source
files, cut into documents of 4000 characters; for a Control Adapter, Python's language reference (class +1) and the same
amount of these files (class -1). Options that depend on the hardware (devices, stages, dtype of the weights) are set
for a CPU, a step has eight sequences of 256 tokens, and evaluation is on held-out documents.

Exits with 1 unless the evaluation loss falls by at least 3 % in each configuration except that of Control Adapters,
which only scale what each layer adds along a few directions. They should make a model write more like the texts of
class +1 and less like those of class -1. So with held-out texts of both, all read as class +1, the loss of the former
must fall, that of the latter must rise, and they must move apart by at least 0.5 % of the loss.
"""

from __future__ import annotations

import argparse
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
FALL = 3.0  # at least, in per cent of the evaluation loss
APART = 0.5  # at least, in per cent of the losses of both classes' texts, which move apart
CLASSES = {1: "reference", -1: "source"}  # for a Control Adapter
OF_CLASSES = (", texts of class +1", ", texts of class -1")
HELD_OUT = 30  # one document of this many


def write_texts(folder: Path) -> None:
    """Write a megabyte of source code, the language reference, and as much source code as the reference has."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = {path.stem: path.read_text(encoding="utf-8", errors="ignore")[: 10 * DOCUMENT] for path in paths}
    write(folder / "texts", sources, BYTES)
    write(folder / "reference", topics)
    write(folder / "source", sources, sum(map(len, topics.values())))


def write(folder: Path, texts: dict[str, str], most: int | None = None) -> None:
    """Write documents of at most ``most`` characters in all, and the held-out ones to a folder next to it."""
    folder.mkdir(parents=True)
    left = sum(map(len, texts.values())) if most is None else most
    for name, text in texts.items():
        for number in range(0, min(len(text), left), DOCUMENT):
            (folder / f"{name}-{number}.txt").write_text(text[number : number + DOCUMENT])
        left = max(0, left - len(text))
    held = folder.with_name(f"held_{folder.name}")
    held.mkdir()
    for path in sorted(folder.glob("*.txt"))[::HELD_OUT]:
        path.rename(held / path.name)


def configuration(name: str, folder: Path, base: Path, steps: int, rate: float | None) -> dict:
    """Return a shipped configuration, adapted to a CPU."""
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
    classes = CLASSES if name == "control_adapter" else {1: "texts"}
    data |= {"sequence_len": 256, "cache_dir": str(folder / "cache"), "eval_fraction": 0, "mix_datasets": True}
    data["datasets"] = [{"dataset_path": f"{folder}/{kind}/*.txt", "control_class": c} for c, kind in classes.items()]
    data["eval_datasets"] = [{"dataset_path": f"{folder}/held_{kind}/*.txt"} for kind in classes.values()]  # class +1
    return config


def losses(config: dict, folder: Path) -> list[tuple[float, float]]:
    """Train; return the loss of each evaluation set before and after, in the order of the configuration."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lightning_pipelite", "fit", "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    lines = re.findall(r"^step \d+: (eval/loss .*)", done.stdout, re.MULTILINE)
    each = [[float(loss) for loss in re.findall(r"eval/loss\S* (\d+\.\d+)", line)] for line in lines]
    return [*zip(each[0], each[-1], strict=True)][-len(config["data"]["eval_datasets"]) :]  # after any mean


def learns(change: float) -> bool:
    """Return whether a change of the evaluation loss, in per cent, is the required fall."""
    return change <= -FALL


def parts(like: float, unlike: float) -> bool:
    """Return whether, by their losses' changes, texts of class +1 became likelier and those of class -1 less likely."""
    return like < 0 < unlike and unlike - like >= APART


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
            found, changes = losses(config, folder), []
            for of, (first, last) in zip([""] if len(found) == 1 else OF_CLASSES, found, strict=True):
                changes.append(100 * (last / first - 1))
                digits = 1 if len(found) == 1 else 2
                cells = f"{config['model']['lr']:g} | {first:.4f} | {last:.4f} | {changes[-1]:+.{digits}f} %"
                report.row(f"| {name}{of} | {cells} |")
            if not (learns(*changes) if len(found) == 1 else parts(*changes)):
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
