"""The strategy: pipeline stages on DeepSpeed's engine, in the Lightning Trainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_pipelite.strategy.strategy import PipeLiteStrategy
    from lightning_pipelite.strategy.trained import load_trained

__all__ = ["PipeLiteStrategy", "load_trained"]


def __getattr__(name: str) -> Any:
    # The reader of checkpoints in here is used without Lightning.
    if name == "PipeLiteStrategy":
        from lightning_pipelite.strategy.strategy import PipeLiteStrategy

        return PipeLiteStrategy
    if name == "load_trained":
        from lightning_pipelite.strategy.lightning_compat import install
        from lightning_pipelite.strategy.trained import load_trained

        install()
        return load_trained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
