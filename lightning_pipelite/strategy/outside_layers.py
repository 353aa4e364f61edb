"""What a module has besides its layers: buffers and frozen weights that no stage saves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_pipelite.errors import ConfigurationError


def outside_layers(module: nn.Module, stage: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's state that are in none of its layers, by name.

    Args:
        module: The LightningModule; the layers of other stages are on the meta device, or absent.
        stage: This rank's stage.
    """
    inside = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    state = module.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not tensor.is_meta and id(tensor) not in inside
    }


def load_outside_layers(module: nn.Module, stage: nn.Module, saved: Mapping[str, Tensor], strict: bool) -> None:
    """Restore what :func:`outside_layers` returned.

    Args:
        module: The LightningModule.
        stage: This rank's stage.
        saved: The tensors from the checkpoint, by name.
        strict: Whether all of them must be there.

    Raises:
        ConfigurationError: If ``strict`` and a tensor is missing or has another shape; the same on every rank.
    """
    for name, tensor in outside_layers(module, stage).items():
        if name in saved and saved[name].shape == tensor.shape:
            with torch.no_grad():
                tensor.copy_(saved[name])
        elif strict:
            found = f"has shape {tuple(saved[name].shape)} in" if name in saved else "is missing from"
            raise ConfigurationError(
                f"ckpt_path: {name} {found} the checkpoint, but {type(module).__name__} has it outside its layers with "
                f"shape {tuple(tensor.shape)}: the checkpoint is of another module; set strict_loading = False in this "
                "one to load it all the same."
            )
