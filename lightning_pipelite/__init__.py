"""Pipeline-parallel fine-tuning of Hugging Face causal LMs inside the Lightning Trainer."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.data.datamodule import PackedDataModule
    from lightning_pipelite.module.pipelite_module import PipeLiteModule
    from lightning_pipelite.strategy.strategy import PipeLiteStrategy

__version__ = "0.1.0"
__all__ = ["PackedDataModule", "PipeLiteModule", "PipeLiteStrategy"]
__getattr__ = lazy_names(
    __name__,
    {
        "PackedDataModule": "data.datamodule",
        "PipeLiteModule": "module.pipelite_module",
        "PipeLiteStrategy": "strategy.strategy",
    },
)
