"""A training checkpoint on disk: a directory with one file a stage and one for the Trainer.

``stage-00.safetensors`` holds the trainable parameters of stage 0 as ``parameter/NAME``, its persistent buffers as
``buffer/NAME`` and its optimizer state as ``optimizer/NAME/KEY``, by name, so that another number of stages can read
it. ``trainer.pt`` holds Lightning's own state (loops, schedulers, callbacks) and is read with ``weights_only=True``:
loading a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pipelite.errors import ConfigurationError

PATH_KEY = "pipelite_checkpoint_path"


def save(
    path: Path,
    trainer_state: dict[str, Any],
    stage: nn.Module,
    optimizer: Optimizer | None,
    *,
    stage_id: int,
    writes: bool,
    barrier: Callable[[], None],
) -> None:
    """Write a checkpoint: to a temporary directory first, renamed when every stage has written. Collective.

    Args:
        path: the directory to write; an older checkpoint of that name is replaced.
        trainer_state: what Lightning saves.
        stage: this rank's stage.
        optimizer: its optimizer, if it trains.
        stage_id: which stage it is.
        writes: whether this rank is the one of its stage that writes.
        barrier: waits for all ranks.
    """
    temporary = path.with_name(f".{path.name}.partial")
    leads = stage_id == 0 and writes
    if leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    if writes:
        tensors, settings = _stage_state(stage, optimizer)
        save_file(tensors, temporary / f"stage-{stage_id:02d}.safetensors", metadata={"settings": json.dumps(settings)})
    if leads:
        torch.save(trainer_state, temporary / "trainer.pt")
    barrier()
    if leads:
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    barrier()


def _stage_state(stage: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    tensors = {f"parameter/{name}": p.detach().cpu().contiguous() for name, p in trained.items()}
    tensors.update({f"buffer/{name}": b.detach().cpu().contiguous() for name, b in _persistent_buffers(stage)})
    settings: dict[str, Any] = {"groups": [], "scalars": {}}
    if optimizer is not None:
        for index, group in enumerate(optimizer.param_groups):
            if not group["params"]:  # optimi completes a group by its parameters: without any, wrongly
                settings["groups"].append({})
                continue
            settings["groups"].append({key: v for key, v in group.items() if key != "params" and _is_plain(v)})
            # optimi counts its steps in a tensor of the group
            tensors.update({f"group/{index}/{key}": v.cpu() for key, v in group.items() if isinstance(v, Tensor)})
        for name, parameter in trained.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
                elif _is_plain(value):
                    settings["scalars"][f"optimizer/{name}/{key}"] = value
    return tensors, settings


def _persistent_buffers(stage: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in stage.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):  # Adam's betas, which some schedules change
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def load_trainer_state(path: Path) -> dict[str, Any]:
    """Read what Lightning saved, with the path added for :func:`load_parameters`.

    Raises:
        ConfigurationError: if there is no such checkpoint.
    """
    if not (path / "trainer.pt").is_file():
        raise ConfigurationError(f"ckpt_path: {path} is not a checkpoint of PipeLiteStrategy (it has no trainer.pt).")
    state: dict[str, Any] = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    return {**state, PATH_KEY: str(path), "state_dict": {}}


def load_parameters(path: Path, stage: nn.Module) -> None:
    """Load this stage's trainable parameters and buffers, whatever the number of stages that wrote them.

    Raises:
        ConfigurationError: if one is missing or has another shape.
    """
    wanted = {f"parameter/{name}": p.data for name, p in stage.named_parameters() if p.requires_grad}
    wanted |= {f"buffer/{name}": b.data for name, b in _persistent_buffers(stage)}
    found = _read(path, lambda key: key in wanted)[0]
    for key, tensor in wanted.items():
        kind, name = key.split("/", 1)
        if key not in found:
            raise ConfigurationError(f"{path} does not hold the {kind} {name}: it is of another model or adapter.")
        if found[key].shape != tensor.shape:
            raise ConfigurationError(
                f"{path} holds {name} with shape {list(found[key].shape)}, not {list(tensor.shape)}: "
                "it is of another model or adapter."
            )
        tensor.copy_(found[key])


def load_optimizer(path: Path, stage: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer state of this stage's parameters, by name, and the settings of its groups."""
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    tensors, settings = _read(path, lambda key: _parameter_of(key) in trained or key.startswith("group/"))
    for group, saved in zip(optimizer.param_groups, settings["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})
    for key in [key for key in tensors if key.startswith("group/")]:
        _, index, name = key.split("/")
        group, tensor = optimizer.param_groups[int(index)], tensors.pop(key)
        group[name] = tensor.to(group[name].device) if isinstance(group.get(name), Tensor) else tensor
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scalars = {key: v for key, v in settings["scalars"].items() if _parameter_of(key) in trained}
    for key, value in {**tensors, **scalars}.items():
        parameter, name = trained[_parameter_of(key)], key.rsplit("/", 1)[1]
        group = group_of.get(id(parameter), {})
        # As torch does it: a count of steps stays on the host, unless the optimizer is to leave it on the device.
        on_host = not isinstance(value, Tensor) or (
            name == "step" and not (group.get("capturable") or group.get("fused"))
        )
        optimizer.state[parameter][name] = value if on_host else value.to(parameter.device)


def _parameter_of(key: str) -> str:
    return key.removeprefix("optimizer/").rsplit("/", 1)[0] if key.startswith("optimizer/") else ""


def _read(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {"groups": [], "scalars": {}}
    for file in sorted(path.glob("stage-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            theirs = json.loads(opened.metadata()["settings"])
            known = settings["groups"] or theirs["groups"]
            settings["groups"] = [mine or other for mine, other in zip(known, theirs["groups"], strict=True)]
            settings["scalars"].update(theirs["scalars"])
            tensors.update({key: opened.get_tensor(key) for key in opened.keys() if wanted(key)})  # noqa: SIM118
    return tensors, settings
