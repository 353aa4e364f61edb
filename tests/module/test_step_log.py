from __future__ import annotations

from pathlib import Path

import pytest

from processes import Workers
from step_log_jobs import OURS, one_trainer_for_two_modules
from tiny_job import write_job


@pytest.mark.parametrize("stops_at", [0, 2])
def test_another_module_of_the_same_trainer_is_left_alone(workers: Workers, tmp_path: Path, stops_at: int) -> None:
    (logged,) = workers.run(1, one_trainer_for_two_modules, str(write_job(tmp_path)), stops_at)
    assert logged == (OURS, set())
