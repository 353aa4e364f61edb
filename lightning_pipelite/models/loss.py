"""The loss of a causal LM on a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.kernels.linear_cross_entropy import linear_cross_entropy
from lightning_pipelite.models.head import HeadInputs


class CausalLMLoss:
    """Cross-entropy of the next token, plus the routers' load-balancing loss if that is trained.

    Args:
        router_aux_loss_coef: Factor of the routers' loss; 0 if the stages do not compute it.

    Attributes:
        logged: Names of the values that are returned besides the loss, for the strategy to log.
    """

    def __init__(self, router_aux_loss_coef: float = 0.0) -> None:
        self._coefficient = router_aux_loss_coef
        self.logged = ("router_aux_loss",) if router_aux_loss_coef else ()

    def __call__(self, outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the summed float32 loss of a micro-batch, its number of tokens, and the sums of logged values.

        The routers' loss is multiplied by the number of tokens, as if the unsplit model's loss of each micro-batch were
        weighted by its tokens. In evaluation only the cross-entropy is computed.

        Args:
            outputs: Logits (batch, sequence, vocabulary), any floating dtype, or a head's inputs; in a pair with the
                routers' loss, a scalar, if it is trained.
            labels: (batch, sequence), int64; the token to predict at each position, or -100.
        """
        scores, *routers = (outputs,) if isinstance(outputs, (Tensor, HeadInputs)) else outputs
        if isinstance(scores, HeadInputs):
            total = linear_cross_entropy(
                scores.hidden,
                scores.weight,
                labels,
                bias=scores.bias,
                scale=scores.scale,
                softcap=scores.softcap,
                rows=scores.rows,
            )
        else:
            total = nn.functional.cross_entropy(
                scores.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
        count = (labels != -100).sum()
        if not self.logged:
            return total, count
        balance = count * (routers[0] if routers else torch.zeros_like(total))
        return total + self._coefficient * balance, count, balance
