"""A training that is killed at random moments and resumed has the same losses as an undisturbed one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


@pytest.mark.slow
def test_a_handful_of_kills() -> None:
    soak = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    # With this seed, the kills are: SIGKILL to one rank at the start, SIGKILL to all during a step, and SIGTERM while a
    # checkpoint is being written.
    command = [sys.executable, str(soak), "--kills", "3", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^3 kills, \d+ steps lost, 0 differences$", done.stdout, re.MULTILINE)
