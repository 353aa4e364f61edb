"""The ``pipelite`` command in a worker, which has imported what a process of its own would import for seconds."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock


def run_command(directory: str, arguments: list[str]) -> None:
    """Run `pipelite` with arguments, in a directory."""
    from lightning_pipelite.cli.main import main

    with contextlib.chdir(directory), mock.patch.object(sys, "argv", ["pipelite", *arguments]):
        main()
