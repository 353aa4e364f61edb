"""The ``pipelite`` command in a worker, which has already done the imports that a fresh process needs seconds for."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock


def run_command(directory: str, arguments: list[str]) -> None:
    """Run `pipelite` with arguments, in a directory."""
    from lightning_pipelite.cli.main import main

    with contextlib.chdir(directory), mock.patch.object(sys, "argv", ["pipelite", *arguments]):
        main()
