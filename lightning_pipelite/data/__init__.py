"""From text files to packed micro-batches: sources, tokens, packing, cache, and the data module."""

from lightning_pipelite.data.config import DatasetConfig
from lightning_pipelite.data.datamodule import PackedDataModule
from lightning_pipelite.data.sampler import PackedSampler
from lightning_pipelite.data.statistics import DataStatistics, SplitStatistics

__all__ = ["DataStatistics", "DatasetConfig", "PackedDataModule", "PackedSampler", "SplitStatistics"]
