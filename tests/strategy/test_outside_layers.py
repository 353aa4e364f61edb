"""A module's state outside of its layers is saved in checkpoints, as under Lightning's own strategies."""

from __future__ import annotations

from pathlib import Path

import pytest

from outside_jobs import beside_the_layers
from processes import Workers


@pytest.mark.parametrize("stages", [1, 2])
def test_buffers_and_frozen_weights_beside_the_layers_are_resumed(
    workers: Workers, tmp_path: Path, stages: int
) -> None:
    """The buffer counts ten batches; a buffer of another shape is refused unless ``strict_loading`` is False."""
    for seen, scale, said, lenient in workers.run(stages, beside_the_layers, str(tmp_path), stages):
        assert (seen, scale) == ([10.0, 10.0], [20.0])
        assert said.startswith("ckpt_path: seen has shape (2,) in the checkpoint, but Beside has it outside its layers")
        assert lenient == [[0.0, 0.0, 0.0], [20.0]]
