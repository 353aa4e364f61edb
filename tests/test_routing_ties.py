import math

import torch

from routing_ties import ClosestChoice


def test_the_smallest_gap_between_what_is_chosen_and_what_is_left_is_seen() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.0], [0.5, 0.0, 0.4375, 0.25]])
    with ClosestChoice() as choice:
        torch.topk(scores, 4, dim=-1)
        assert choice.gap == math.inf  # nothing is left
        torch.topk(scores, k=2, dim=-1, sorted=False)
        assert choice.gap == 0.125
        scores.T.topk(3, 0, largest=False)
        assert choice.gap == 0.0625
    torch.zeros(3).topk(1)
    assert choice.gap == 0.0625
