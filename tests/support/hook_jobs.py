"""A training that records which hooks of its module are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from former_jobs import Remembers, Saving
from lightning_pipelite.callbacks import TimedCheckpoint
from stage_jobs import Catchable, trainer_for
from stage_models import Model, floats, linears

CALLED = {
    "configure_callbacks", "configure_gradient_clipping", "configure_model", "configure_optimizers",
    "lr_scheduler_step", "on_after_backward", "on_after_batch_transfer", "on_before_backward",
    "on_before_batch_transfer", "on_before_optimizer_step", "on_before_zero_grad", "on_fit_end", "on_fit_start",
    "on_load_checkpoint", "on_save_checkpoint", "on_train_batch_end", "on_train_batch_start", "on_train_end",
    "on_train_epoch_end", "on_train_epoch_start", "on_train_start", "on_validation_batch_end",
    "on_validation_batch_start", "on_validation_end", "on_validation_epoch_end", "on_validation_epoch_start",
    "on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad", "on_validation_start",
    "optimizer_step", "optimizer_zero_grad", "prepare_data", "setup", "teardown", "train_dataloader",
    "transfer_batch_to_device", "val_dataloader",
}  # fmt: skip
"""The hooks called in a training that is resumed once."""

HOOKS = {
    "called": CALLED,
    # Hooks of test and predict; the last is from before configure_model existed.
    "not for training": {
        *(f"on_{kind}_{point}" for kind in ("test", "predict") for point in ("start", "end", "model_eval")),
        *(f"on_{kind}_{unit}_{point}" for kind in ("test", "predict") for unit in ("batch", "epoch")
          for point in ("start", "end")),
        "on_test_model_train", "test_dataloader", "predict_dataloader", "configure_sharded_model",
    },
}  # fmt: skip


def hooks_called(folder: str) -> set[str]:
    """Return which of all the hooks are called; the module overrides each."""
    called: set[str] = set()

    def noting(name: str) -> Callable[..., Any]:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return getattr(super(Noting, self), name)(*args, **kwargs)

        return hook

    class Noting(Saving):
        def configure_optimizers(self) -> Any:
            import torch

            called.add("configure_optimizers")
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}

        def train_dataloader(self) -> Any:
            called.add("train_dataloader")
            return Remembers(self.model.batches, batch_size=None)  # type: ignore[arg-type]

        def val_dataloader(self) -> Any:
            called.add("val_dataloader")
            return Remembers(self.model.batches, batch_size=None)  # type: ignore[arg-type]

        def pipeline_layers(self) -> Any:
            return self.model.layers, self.model.loss

    own = {"configure_optimizers", "train_dataloader", "val_dataloader", "configure_sharded_model"}
    for name in {*CALLED, *HOOKS["not for training"], "training_step", "validation_step"} - own:
        setattr(Noting, name, noting(name))
    for epochs, ckpt_path in ((1, None), (2, "last")):
        timed = TimedCheckpoint(dirpath=str(Path(folder) / "checkpoints"))
        trainer: L.Trainer = trainer_for(
            Catchable(1), 1, callbacks=[timed], enable_checkpointing=True, max_epochs=epochs, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(Noting(Model(linears(2), floats(4))), ckpt_path=ckpt_path)
    return called
