"""Weights load from a checkpoint into a module, and hyperparameters are stored in it as plain containers."""

from __future__ import annotations

from collections import UserDict, UserList
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pipelite.callbacks import SaveTrained, TimedCheckpoint
from lightning_pipelite.checkpoint.encoding import decode, encode
from lightning_pipelite.checkpoint.manifest import read_manifest
from lightning_pipelite.checkpoint.store import CheckpointStore
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy import load_trained
from lightning_pipelite.strategy.layers import SequentialLayers


class Layered(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4, width) for width in widths))

    def pipeline_layers(self) -> Any:
        return list(self.net), nn.functional.mse_loss


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[Layered, Path, CheckpointStore]]:
    store = CheckpointStore(Topology(1, 1), 0, torch.device("cpu"), timedelta(seconds=60))
    module, path = Layered(4, 4), tmp_path / "a.ckpt"
    stage = SequentialLayers(list(module.net)).build_stage(0, 2, torch.device("cpu"))
    store.save(path, {}, {"stages": 1, "identity": {}}, stage, None)
    store.wait()
    yield module, path, store
    store.close()


def test_into_a_module(saved: Any) -> None:
    module, path, _ = saved
    loaded = load_trained(Layered(4, 4), path)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), atol=0, rtol=0)
    with pytest.raises(ConfigurationError, match=r"does not hold the parameter 2\.weight"):
        load_trained(Layered(4, 4, 4), path)


def test_what_is_not_strict_is_told(saved: Any) -> None:
    module, path, store = saved
    store.open(path, {})
    for widths, sentence in (
        ((4, 4, 4), r"does not hold 2\.bias, 2\.weight: initial values are kept"),
        ((4,), r"holds 1\.bias, 1\.weight: this is ignored"),
    ):
        other = Layered(*widths)
        stage = SequentialLayers(list(other.net)).build_stage(0, len(widths), torch.device("cpu"))
        with torch.no_grad(), pytest.warns(UserWarning, match=sentence):
            store.load_parameters(stage, strict=False)
        assert torch.equal(other.net[0].weight, module.net[0].weight)
        with pytest.raises(ConfigurationError):
            store.load_parameters(stage)


def test_a_file_of_another_strategy_is_told_from_other_things(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ConfigurationError, match=r"wrote under another strategy.*load_from_checkpoint"):
        read_manifest(tmp_path / "plain.ckpt")


def test_hyper_parameters_in_containers_of_a_library_become_plain() -> None:
    class Missing(UserDict):  # type: ignore[type-arg]
        def __getitem__(self, key: Any) -> Any:
            if key == "missing":
                raise ValueError("no value")
            return super().__getitem__(key)

    given = UserDict(
        {"lr": 0.1, "net": UserDict({"widths": UserList([1, 2])}), "more": Missing({"missing": 1, "a": 2})}
    )
    tensors: dict[str, torch.Tensor] = {}
    stored = decode(encode({"hyper_parameters": given}, tensors), tensors)["hyper_parameters"]
    assert stored == {"lr": 0.1, "net": {"widths": [1, 2]}, "more": {"missing": "(no value)", "a": 2}}


@pytest.mark.parametrize("address", ["s3://bucket/a", "memory://a", "file:///tmp/a"])
def test_addresses_are_no_directories(address: str) -> None:
    for make in (lambda: TimedCheckpoint(dirpath=address), lambda: SaveTrained(address)):
        with pytest.raises(ConfigurationError, match="only directories of the file system"):
            make()
