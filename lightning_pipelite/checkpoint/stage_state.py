"""Saves a stage's trained parameters, buffers and optimizer state as tensors by name, and loads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pipelite.checkpoint.encoding import decode, encode
from lightning_pipelite.checkpoint.layout import BUFFER, GROUP, OPTIMIZER, PARAMETER
from lightning_pipelite.checkpoint.reader import stage_settings, stage_tensors
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.optim.offloaded import OffloadedOptimizer, class_of


def stage_state(stage: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what is saved of a stage: the tensors of its file, not copied, and its settings, ready for JSON.

    Raises:
        ConfigurationError: If the optimizer holds something that cannot be expressed as JSON and tensors.
    """
    trained = _trained(stage)
    tensors: dict[str, Tensor] = {PARAMETER + name: p.detach() for name, p in trained.items()}
    tensors.update({BUFFER + name: b.detach() for name, b in _persistent_buffers(stage)})
    if optimizer is None:
        return tensors, {"optimizer": None, "groups": [], "values": {}}
    settings: dict[str, Any] = {"optimizer": _kind(optimizer), "groups": [], "values": {}}
    for index, group in enumerate(optimizer.param_groups):
        kept: dict[str, Any] = {}
        for key, value in group.items():
            if isinstance(value, Tensor):  # optimi keeps its step count in a tensor of the group
                tensors[f"{GROUP}{index}/{key}"] = value.detach()
            elif key != "params":
                kept[key] = encode(value, {}, f"{key} of the optimizer's group {index}")
        # optimi infers options of a group from its parameters, and gets them wrong if there are none
        settings["groups"].append(kept if group["params"] else {})
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{name}/{key}"] = value.detach()
            else:
                settings["values"][f"{OPTIMIZER}{name}/{key}"] = encode(value, {}, f"the optimizer's {key} for {name}")
    return tensors, settings


def state_names(stage: nn.Module) -> set[str]:
    """Return the names of a stage's trained parameters and buffers in a checkpoint file."""
    return {PARAMETER + name for name in _trained(stage)} | {BUFFER + name for name, _ in _persistent_buffers(stage)}


def load_parameters(
    path: Path, stages: int, stage: nn.Module, everyones: set[str], strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load this stage's trained parameters and buffers, whatever the number of stages that wrote them.

    Args:
        path: The checkpoint.
        stages: How many stages wrote it.
        stage: The stage to load them into.
        everyones: The :func:`state_names` of all stages together.
        strict: Whether the checkpoint must hold exactly these names.

    Returns:
        The names missing from the checkpoint, and the unexpected ones in it; both empty if ``strict``.

    Raises:
        ConfigurationError: If ``strict`` and a name is missing or unexpected, or if a shape or dtype differs.
    """
    wanted: dict[str, Tensor] = {PARAMETER + name: p.data for name, p in _trained(stage).items()}
    wanted |= {BUFFER + name: b.data for name, b in _persistent_buffers(stage)}
    found = dict(stage_tensors(path, stages, lambda key: key in wanted))
    missing, more = [], []
    for key, tensor in wanted.items():
        kind, name = key.split("/", 1)
        if key not in found:
            missing.append(name)
            if not strict:
                continue
            raise ConfigurationError(f"{path} does not hold the {kind} {name}: it is from another model or adapter.")
        theirs = found[key]
        for what, saved, ours in (("shape", [*theirs.shape], [*tensor.shape]), ("dtype", theirs.dtype, tensor.dtype)):
            if saved != ours:
                raise ConfigurationError(
                    f"{path} holds the {kind} {name} with {what} {saved}, not {ours}: it is from another model or "
                    "adapter."
                )
    for key, _ in stage_tensors(path, stages, lambda key: key.startswith((PARAMETER, BUFFER)) and key not in everyones):
        kind, name = key.split("/", 1)
        more.append(name)
        if not strict:
            continue
        raise ConfigurationError(
            f"{path} holds the {kind} {name}, which is not trained here: it is from another model or adapter."
        )
    for key, tensor in wanted.items():  # only after all checks: all or nothing
        if key in found:
            tensor.copy_(found[key])
    return missing, more


def check_optimizer(path: Path, stages: int, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Check that a checkpoint is of the same optimizer, and return the settings of its groups, still encoded.

    Raises:
        ConfigurationError: If the checkpoint is of another optimizer, or has none, or has another number of groups.
    """
    settings = stage_settings(path, stages)
    if (saved := settings[0]["optimizer"]) != _kind(optimizer):
        raise ConfigurationError(
            f"{path} was saved with the optimizer {saved}, not {_kind(optimizer)}: use the same optimizer."
        )
    groups: list[dict[str, Any]] = settings[0]["groups"]
    for others in settings[1:]:
        groups = [mine or other for mine, other in zip(groups, others["groups"], strict=True)]
    if len(groups) != len(optimizer.param_groups):
        raise ConfigurationError(
            f"{path} has {len(groups)} optimizer parameter groups, not {len(optimizer.param_groups)}: configure the "
            "same groups."
        )
    return groups


def load_optimizer(path: Path, stages: int, stage: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer state of this stage's parameters, by name, and the settings of the optimizer's groups.

    Raises:
        ConfigurationError: As :func:`check_optimizer`.
    """
    trained = _trained(stage)
    groups = check_optimizer(path, stages, optimizer)
    settings = stage_settings(path, stages)
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: decode(value, {}) for key, value in kept.items()})
    values: dict[str, Any] = {key: decode(v, {}) for each in settings for key, v in each["values"].items()}
    values.update(stage_tensors(path, stages, lambda key: _parameter_of(key) in trained or key.startswith(GROUP)))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for key, value in values.items():
        if key.startswith(GROUP):
            _, index, name = key.split("/")
            group = optimizer.param_groups[int(index)]
            group[name] = value.to(group[name].device) if isinstance(group.get(name), Tensor) else value
        elif (parameter := trained.get(_parameter_of(key))) is not None:
            name, group = key.rsplit("/", 1)[1], group_of.get(id(parameter), {})
            # As in torch, a step count stays on the host unless the optimizer is capturable or fused.
            on_host = not isinstance(value, Tensor) or (
                name == "step" and not (group.get("capturable") or group.get("fused"))
            )
            if isinstance(optimizer, OffloadedOptimizer) and not on_host:
                optimizer.put_away(parameter, name, value)
            else:
                optimizer.state[parameter][name] = value if on_host else value.to(parameter.device)


def _trained(stage: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in stage.named_parameters() if p.requires_grad}


def _persistent_buffers(stage: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in stage.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _kind(optimizer: Optimizer) -> str:
    kind = class_of(optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def _parameter_of(key: str) -> str:
    return key.removeprefix(OPTIMIZER).rsplit("/", 1)[0] if key.startswith(OPTIMIZER) else ""
