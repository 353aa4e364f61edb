"""Tables that a benchmark prints and can save, with the machine and versions they were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "deepspeed", "transformers", "peft", "bitsandbytes", "torch-optimi")


def environment() -> str:
    """Return the hardware, the versions and the commit (``COMMIT``, if it is set) in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    commit = os.environ.get("COMMIT") or _git("describe", "--always", "--dirty") or "unknown"
    return f"{device}; Python {platform.python_version()}, {versions}; commit {commit}"


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


class Report:
    """Prints a Markdown table line by line, and writes it on request.

    Args:
        name: Name of the file in benchmarks/results, without its suffix.
        head: The first lines of the table.
    """

    def __init__(self, name: str, *head: str) -> None:
        self._path = RESULTS / f"{name}.md"
        self._lines: list[str] = []
        for line in head:
            self.row(line)

    def row(self, line: str) -> None:
        """Add a row of the table."""
        self._lines.append(line)
        print(line, flush=True)

    def line(self, line: str) -> None:
        """Add a line after the table."""
        self.row("")
        self.row(line)

    def write(self) -> None:
        """Write the table with the command, the hardware, the versions and the commit."""
        command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
        RESULTS.mkdir(exist_ok=True)
        self._path.write_text("\n".join([f"`{command}`", "", environment(), "", *self._lines, ""]), encoding="utf-8")
