"""Pipeline-parallel fine-tuning of Hugging Face causal LMs inside the Lightning Trainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_pipelite.data import PackedDataModule
    from lightning_pipelite.module.pipelite_module import PipeLiteModule
    from lightning_pipelite.strategy import PipeLiteStrategy

__version__ = "0.1.0"
__all__ = ["PackedDataModule", "PipeLiteModule", "PipeLiteStrategy"]


def __getattr__(name: str) -> Any:
    # Lightning, transformers and PEFT take ten seconds to import: `pipelite --version` need not wait for them.
    if name == "PackedDataModule":
        from lightning_pipelite.data import PackedDataModule

        return PackedDataModule
    if name == "PipeLiteModule":
        from lightning_pipelite.module.pipelite_module import PipeLiteModule

        return PipeLiteModule
    if name == "PipeLiteStrategy":
        from lightning_pipelite.strategy import PipeLiteStrategy

        return PipeLiteStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
