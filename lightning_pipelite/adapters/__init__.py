"""What is trained: LoRA, Control Adapters or the model's own weights, for all or for chosen layers."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.adapters.base import Adapter
    from lightning_pipelite.adapters.control_adapter import ControlAdapter
    from lightning_pipelite.adapters.control_files import load_control_adapter
    from lightning_pipelite.adapters.full import Full
    from lightning_pipelite.adapters.lora import LoRA

__all__ = ["Adapter", "ControlAdapter", "Full", "LoRA", "load_control_adapter"]
__getattr__ = lazy_names(
    __name__,
    {
        "Adapter": "base",
        "ControlAdapter": "control_adapter",
        "load_control_adapter": "control_files",
        "Full": "full",
        "LoRA": "lora",
    },
)
