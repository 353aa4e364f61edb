"""Tests of kernels under Triton's interpreter, for machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pass_interpreted(file: str) -> None:
    """Run the tests of a file in a fresh process, since Triton decides at import whether to interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed, 1 skipped" in done.stdout  # the skipped one calls this
