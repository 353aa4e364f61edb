"""The strategy: pipeline stages in the Lightning Trainer, on DeepSpeed's engine."""

from typing import TYPE_CHECKING, Any

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.strategy.strategy import PipeLiteStrategy
    from lightning_pipelite.strategy.trained import load_trained

__all__ = ["PipeLiteStrategy", "load_trained"]
_find = lazy_names(__name__, {"PipeLiteStrategy": "strategy", "load_trained": "trained"})


def __getattr__(name: str) -> Any:
    if name == "load_trained":  # so that Lightning's own loaders read checkpoints; the strategy installs this itself
        from lightning_pipelite.strategy.lightning_compat import install

        install()
    return _find(name)
