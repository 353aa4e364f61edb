"""The LightningModule that puts a causal LM, its adapter, its loss and its optimizer together."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.module.pipelite_module import PipeLiteModule

__all__ = ["PipeLiteModule"]
__getattr__ = lazy_names(__name__, {"PipeLiteModule": "pipelite_module"})
