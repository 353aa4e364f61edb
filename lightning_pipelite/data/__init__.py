"""From text files to packed micro-batches: sources, tokens, packing, cache, and the data module."""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.data.config import DatasetConfig
    from lightning_pipelite.data.datamodule import PackedDataModule
    from lightning_pipelite.data.sampler import PackedSampler
    from lightning_pipelite.data.statistics import DataStatistics, SplitStatistics

__all__ = ["DataStatistics", "DatasetConfig", "PackedDataModule", "PackedSampler", "SplitStatistics"]
__getattr__ = lazy_names(
    __name__,
    {
        "DatasetConfig": "config",
        "PackedDataModule": "datamodule",
        "PackedSampler": "sampler",
        "DataStatistics": "statistics",
        "SplitStatistics": "statistics",
    },
)
