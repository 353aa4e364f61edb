"""Parameters with the same name in several stages are tied; if that seems unintended, it is reported."""

from __future__ import annotations

import pytest

from processes import Workers
from tie_jobs import told


def test_layers_that_have_a_name_in_common_alone_are_told(workers: Workers) -> None:
    first, other = workers.run(2, told, ["0", "0"], [1, 2])
    (warning,) = first
    assert warning.startswith("0.bias, 0.weight occur in several stages and had different initial values;")
    assert warning.endswith("give them names that do not depend on the partition.")
    assert other == []
    assert workers.run(2, told, ["0", "1"], [1, 2])[0] == []
    assert workers.run(2, told, ["0", "0"], [1, 1])[0] == []


@pytest.mark.parametrize(
    ("outputs", "trained", "reason"),
    [(3, True, "with different shapes or dtypes"), (4, False, "not trained in all of them")],
)
def test_what_cannot_be_tied_is_refused_on_every_rank(
    workers: Workers, outputs: int, trained: bool, reason: str
) -> None:
    for messages in workers.run(2, told, ["0", "0"], [1, 1], outputs, trained):
        (message,) = messages
        assert f"is in stages 0 and 1, but {reason}; parameters with the same name are tied" in message
