"""Lightning's own loaders read or refuse checkpoints of the strategy, and do everything else as before."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities import cloud_io
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core import saving
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from elsewhere_jobs import QUIET, Frozen, evaluate, loader, train
from lightning_pipelite import PipeLiteModule
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy import lightning_compat
from processes import Workers


@pytest.fixture(scope="module", params=[1, 2])
def trained(request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a training with one stage, or with two, and its weights."""
    ranks = workers.run(request.param, train, tmp_path_factory.mktemp("trained"), request.param)
    state = {name: tensor for rank in reversed(ranks) for name, tensor in rank["state"].items()}
    return {**ranks[0], "state": state}


def plain(**options: Any) -> L.Trainer:
    return L.Trainer(**{"devices": 1, "max_epochs": 1, "enable_checkpointing": False, **QUIET, **options})


@pytest.mark.parametrize("form", [str, Path, "{}/".format, "{}/../last.ckpt".format])
def test_a_module_is_loaded_under_its_own_names(trained: Any, form: Any) -> None:
    module = Frozen.load_from_checkpoint(form(trained["path"]), map_location="cpu", seed=3)
    assert module.hparams["width"] == 5
    assert module.state_dict().keys() == trained["state"].keys()
    torch.testing.assert_close(dict(module.state_dict()), trained["state"], atol=0, rtol=0)
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True, True, True]


def test_of_another_shape_is_refused(trained: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"with shape \[5\], not \[6\]"):
        Frozen.load_from_checkpoint(trained["path"], width=6)


@pytest.mark.parametrize(
    ("call", "strategy"), [("validate", "auto"), ("test", "auto"), ("predict", "auto"), ("validate", "ddp")]
)
def test_it_is_evaluated_under_other_strategies(trained: Any, workers: Workers, call: str, strategy: str) -> None:
    ((loss, state),) = workers.run(1, evaluate, trained["path"], call, strategy)
    assert loss == pytest.approx(trained["loss"], abs=1e-5)
    torch.testing.assert_close(state, trained["state"], atol=0, rtol=0)


@pytest.mark.parametrize("name", [None, "best", "last"])
def test_a_training_under_another_strategy_is_refused_in_a_sentence(trained: Any, name: str | None) -> None:
    kept = ModelCheckpoint(Path(trained["path"]).parent, save_last=True)
    kept.best_model_path = trained["path"]
    trainer = plain(callbacks=[kept], enable_checkpointing=True)
    with pytest.raises(ConfigurationError, match=r"ckpt_path: .*/(step=4|last)\.ckpt was written .*load_trained\("):
        trainer.fit(Frozen(5), loader(), loader(), ckpt_path=name or trained["path"])


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_loads_in_its_own_way_is_refused(trained: Any, strategy: Any) -> None:
    """Otherwise it would evaluate the module's initial weights."""
    trainer = plain()
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    trainer.state.fn = TrainerFn.VALIDATING
    with pytest.raises(ConfigurationError, match=f"{strategy.__name__} cannot resume from its stages"):
        trainer._checkpoint_connector.resume_start(trained["path"])


@pytest.mark.parametrize("lost", ["manifest.json", "manifest.sha256", "stage-00.safetensors", "trainer.json"])
def test_one_that_is_not_whole_is_refused(trained: Any, tmp_path: Path, lost: str) -> None:
    broken = Path(shutil.copytree(trained["path"], tmp_path / "broken.ckpt"))
    (broken / lost).unlink()
    for act in (
        lambda: Frozen.load_from_checkpoint(broken),
        lambda: plain().validate(Frozen(5), loader(), ckpt_path=broken),
    ):
        with pytest.raises(ConfigurationError, match=r"broken\.ckpt"):
            act()


def test_all_else_is_lightnings(tmp_path: Path) -> None:
    trainer = plain(max_steps=1)
    trainer.fit(Frozen(5), loader())
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    with (tmp_path / "file.ckpt").open("rb") as opened:
        for source in (tmp_path / "file.ckpt", str(tmp_path / "file.ckpt"), opened):
            module = Frozen.load_from_checkpoint(source, weights_only=False)
            torch.testing.assert_close(module.state_dict(), trainer.model.state_dict(), atol=0, rtol=0)
    plain(max_steps=2).fit(Frozen(5), loader(), ckpt_path=tmp_path / "file.ckpt", weights_only=False)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "meta.pt").touch()
    (tmp_path / "sharded" / "manifest.json").touch()
    for path, error in ((tmp_path / "sharded", IsADirectoryError), (tmp_path / "none.ckpt", FileNotFoundError)):
        with pytest.raises(error):
            Frozen.load_from_checkpoint(path)
        with pytest.raises(error):
            plain().validate(Frozen(5), loader(), ckpt_path=path)
    with pytest.raises(RuntimeError, match="Missing key"):
        Frozen(5).load_state_dict({})
    assert Frozen(5).load_state_dict({}, strict=False).missing_keys


def test_a_model_in_stages_says_where_it_is_loaded(trained: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"ckpt_path.*pipelite convert --checkpoint"):
        PipeLiteModule.load_from_checkpoint(trained["path"])


def test_lightning_still_has_what_is_replaced() -> None:
    """Fails if Lightning renames one of them or calls it differently: then check whether it is still needed."""
    assert lightning_compat._load is cloud_io._load
    assert saving.pl_load is lightning_compat.load
    for ours, theirs in (
        (lightning_compat.load, cloud_io._load),
        (lightning_compat.resume_start, lightning_compat._resume_start),
    ):
        assert list(inspect.signature(ours).parameters)[1:] == list(inspect.signature(theirs).parameters)[1:]
    source = inspect.getsource(_CheckpointConnector)
    assert "self._loaded_checkpoint" in source
    assert "self._ckpt_path" in source
    assert "load_model_state_dict" in vars(DeepSpeedStrategy)
    assert "load_model_state_dict" not in vars(DDPStrategy)


def test_another_bases_way_to_load_is_not_passed_over() -> None:
    loaded: list[Any] = []

    class Base(torch.nn.Module):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            loaded.append(state_dict)
            return super().load_state_dict(state_dict, *args, **kwargs)

    class Both(L.LightningModule, Base):
        pass

    Both().load_state_dict({})
    assert loaded == [{}]
