"""What a module has beside its layers is in its checkpoints, as under Lightning's own strategies."""

from __future__ import annotations

from pathlib import Path

import pytest

from outside_jobs import beside_the_layers
from processes import Workers


@pytest.mark.parametrize("stages", [1, 2])
def test_buffers_and_frozen_weights_beside_the_layers_are_resumed(
    workers: Workers, tmp_path: Path, stages: int
) -> None:
    """Ten batches; a module whose buffer has another shape is refused, unless it lets names and shapes differ."""
    for seen, scale, said, lenient in workers.run(stages, beside_the_layers, str(tmp_path), stages):
        assert (seen, scale) == ([10.0, 10.0], [20.0])
        assert said.startswith("ckpt_path: the checkpoint has seen in the shape (2,), which is in no layer of Beside")
        assert lenient == [[0.0, 0.0, 0.0], [20.0]]
