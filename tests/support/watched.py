"""Jobs of real processes, and how they end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

JOB = str(Path(__file__).with_name("watchdog_job.py"))


@dataclass
class Outcome:
    """The end of a job: the ranks' exit statuses (or, if their parent is a rank, the parent's), and stderr."""

    codes: list[int]
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]
