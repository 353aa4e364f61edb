"""A training that is killed at random moments, and resumed, has the losses of one that is not."""

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
    # The moments and the signals of this seed are: while it starts, SIGKILL to one; in a step, to all; while it
    # writes, SIGTERM.
    command = [sys.executable, str(soak), "--kills", "3", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^3 kills, \d+ steps lost, 0 differences$", done.stdout, re.MULTILINE)
