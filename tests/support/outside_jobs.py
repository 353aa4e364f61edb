"""A module with a buffer and a weight outside of all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_jobs import ROWS, Mlp, data
from lightning_pipelite.errors import ConfigurationError
from stage_jobs import Catchable, trainer_for


class Beside(Mlp):
    """Has a buffer and a frozen weight outside of its layers."""

    def __init__(self, size: int = 2, strict: bool = True) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(size))
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.strict_loading = strict

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += 1
        self.scale += 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def beside_the_layers(folder: str, stages: int) -> list[Any]:
    """Return both after two epochs, the second of them resumed, and the errors of modules whose state differs."""
    rows = DataLoader(data(5 * ROWS), batch_size=ROWS)
    for epochs in (1, 2):
        module = Beside()
        trainer = trainer_for(Catchable(stages), stages, max_epochs=epochs)
        path = f"{folder}/{epochs}.ckpt"
        trainer.fit(module, rows, ckpt_path=f"{folder}/1.ckpt" if epochs > 1 else None)
        trainer.save_checkpoint(path)
    found: list[Any] = [module.seen.tolist(), module.scale.tolist()]
    for strict in (True, False):
        trainer, other = trainer_for(Catchable(stages), stages), Beside(3, strict)
        try:
            trainer.validate(other, rows, ckpt_path=path)
            found.append([other.seen.tolist(), other.scale.tolist()])
        except ConfigurationError as error:
            found.append(str(error))
    return found
