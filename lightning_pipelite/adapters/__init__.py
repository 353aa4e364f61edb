"""What is trained: LoRA or the model's own weights, for all or for chosen layers."""

from lightning_pipelite.adapters.base import Adapter
from lightning_pipelite.adapters.full import Full
from lightning_pipelite.adapters.lora import LoRA

__all__ = ["Adapter", "Full", "LoRA"]
