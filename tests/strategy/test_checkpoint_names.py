"""Checkpoints written in the background are named and deleted exactly as Lightning's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from names_jobs import ROW, named
from processes import Workers


@pytest.mark.parametrize("name", ROW)
def test_as_under_lightnings_own_strategy(workers: Workers, tmp_path: Path, name: str) -> None:
    expected, found = (workers.run(1, named, str(tmp_path / kind), name, kind == "plain")[0] for kind in ("plain", "x"))
    assert found == expected
