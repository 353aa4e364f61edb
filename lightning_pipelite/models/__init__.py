"""Causal LMs on disk as pipeline layers: splitting, loading one stage, quantisation."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.models.layers import CausalLMLayers
    from lightning_pipelite.models.meta_model import MetaModel
    from lightning_pipelite.models.stage import Stage

__all__ = ["CausalLMLayers", "MetaModel", "Stage"]
__getattr__ = lazy_names(__name__, {"CausalLMLayers": "layers", "MetaModel": "meta_model", "Stage": "stage"})
