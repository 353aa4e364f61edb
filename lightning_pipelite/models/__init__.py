"""A causal LM from disk, as layers: split, load one stage, quantise."""

from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stage import Stage

__all__ = ["CausalLMLayers", "MetaModel", "Stage"]
