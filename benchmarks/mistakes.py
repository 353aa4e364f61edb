"""How long it takes until a user's mistake is reported: the mistakes of tests/errors, each in a fresh process.

    python benchmarks/mistakes.py [--each 8] [--tables wrong_data ...] [--write]

`--each N` takes N from each table, evenly spread, and all of a newcomer's first tries. Next to the wall time is the CPU
time, which does not depend on other load on the machine. Mistakes that need the output of a training are skipped, as
none runs here.

Exits with 1 if a mistake is not reported with its expected message.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import tests_support  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PLACES = [ROOT / "tests" / "errors", ROOT / "tests"]
sys.path[1:1] = map(str, PLACES)
TABLES = ("wrong_options", "wrong_models", "wrong_data", "wrong_runs", "wrong_commands", "wrong_first_tries")


def main() -> None:
    from report import Report

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/mistakes.md")
    parser.add_argument("--each", type=int, help="mistakes of each table")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="the tables")
    parser.add_argument("--package", type=Path, default=ROOT, help="where the package is, to measure another state")
    arguments = parser.parse_args()
    report = Report("mistakes", "| mistake | message | seconds | CPU seconds |", "| --- | --- | --- | --- |")
    wrong, all_told = 0, []
    with tempfile.TemporaryDirectory() as folder:
        job = importlib.import_module("tiny_job").write_job(Path(folder) / "job")
        for table in arguments.tables:
            cases = {**importlib.import_module(table).CASES}
            cases = {name: case for name, case in cases.items() if not _needs_training(case)}
            step = len(cases) / (arguments.each or len(cases)) if table != TABLES[-1] else 1.0
            chosen = [name for number, name in enumerate(cases) if number % max(step, 1.0) < 1.0]
            for number, name in enumerate(chosen):
                here = Path(folder) / f"{table}-{number}"
                here.mkdir()
                told, seconds, processor = _tell(cases[name], here, job, arguments.package)
                begins = max(re.split(r"{\w+}|\.\.\.", cases[name].says), key=len)
                is_right = begins in told
                wrong += not is_right
                all_told.append(processor)
                words = " ".join(told.replace(f"{folder}/", "").replace("|", "\\|").split()[:9])
                report.row(f"| {name} | {words} ... | {seconds:.1f} | {processor:.1f}{'' if is_right else ' WRONG'} |")
    fast = sum(processor < 1 for processor in all_told)
    slow = sum(processor >= 3 for processor in all_told)
    report.line(f"{len(all_told)} mistakes: {fast} reported within one second of CPU time, {slow} in three or more")
    if arguments.write:
        report.write()
    sys.exit(wrong > 0)


def _needs_training(case: Any) -> bool:
    """Return whether a case reads an adapter or a checkpoint that the tests' job has trained."""
    copies = [cell.cell_contents for cell in case.prepare.__closure__ or ()]
    words = " ".join([*case.command, *case.arguments, str(case.edit), *map(str, copies)])
    return (
        any(name in words for name in ("{job}/adapter", "{job}/control", "adapter-checkpoint")) or "adapter" in copies
    )


def _tell(case: object, here: Path, job: Path, package: Path) -> tuple[str, float, float]:
    from wrong_input import Case, edited

    assert isinstance(case, Case)
    size = (job / "model" / "model.safetensors").stat().st_size

    def filled(text: str) -> str:
        for place, value in {"job": job, "here": here, "size": size - 100, "whole": size}.items():
            text = text.replace("{" + place + "}", str(value))
        return text

    (here / "config.yaml").write_text(
        filled(yaml.safe_dump(edited(importlib.import_module("tiny_job").options(job), case.edit))), encoding="utf-8"
    )
    case.prepare(here, job)
    words = [*map(filled, [*case.command, *case.arguments])]
    environment = {**os.environ, "PYTHONPATH": str(package), **case.environment}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lightning_pipelite", *words], cwd=here, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stderr.removeprefix("pipelite: error: ").strip(), seconds, processor


if __name__ == "__main__":
    main()
