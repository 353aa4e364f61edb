"""The LightningModule that puts a causal LM, its adapter, its loss and its optimizer together."""

from lightning_pipelite.module.pipelite_module import PipeLiteModule

__all__ = ["PipeLiteModule"]
