"""The strategy: pipeline stages on DeepSpeed's engine, in the Lightning Trainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_pipelite.strategy.strategy import PipeLiteStrategy

__all__ = ["PipeLiteStrategy"]


def __getattr__(name: str) -> Any:
    # The reader of checkpoints in here is used without Lightning.
    if name == "PipeLiteStrategy":
        from lightning_pipelite.strategy.strategy import PipeLiteStrategy

        return PipeLiteStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
