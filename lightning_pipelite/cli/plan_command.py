"""``pipelite plan``: what a training run will take, before it starts, without a GPU or the model's weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.optim.offloaded import offload_state
from lightning_pipelite.planning.before_training import device_memory
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.gpus import REFERENCE, Gpu, gpu_named
from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.report import Report
from lightning_pipelite.planning.settings import Settings, class_of, dtype_of, parse_memory, settings_of
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.strategy.device_speeds import parse_speeds


def plan(
    config: str | Configuration,
    devices: int | None = None,
    memory: str | None = None,
    speeds: str | None = None,
    hosts: int | None = None,
    model_dir: str | None = None,
    sequence_len: int | None = None,
    device: str | None = None,
    picture: str | None = None,
) -> Report:
    """Show how much memory training takes on each GPU, whether it fits, and the fastest setup.

    The model's config.json is enough: neither its weight files nor a GPU are needed.

    Args:
        config: The configuration of pipelite fit: a file, or on the command line several --config and options of fit.
        devices: GPUs per host; by default, those of the configuration.
        memory: Memory of each GPU, such as 24GiB (or 24, which means the same), or one value per GPU in rank order if
            they differ, such as 24GiB,24GiB,16GiB. By default, that of --device, or of the smallest GPU of this
            machine; unknown if there is none.
        speeds: Relative speed of each GPU, such as 1,1,0.6; by default, those of the configuration.
        hosts: Number of hosts; by default, that of the configuration.
        model_dir: Model directory, instead of the configuration's.
        sequence_len: Tokens per sequence, instead of the configuration's.
        device: Type of GPU, for its speed and memory: 3090, 4090, 5090, a6000, l40s, a100, h100 or h200. Times are
            estimated from the manufacturer's figures, or from measured rates for the H100.
        picture: PNG file to write, with a bar chart of each stage's memory.
    """
    torch.set_num_threads(1)  # the computations are tiny
    for name, value in (("devices", devices), ("hosts", hosts), ("sequence_len", sequence_len)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}; give a number of at least 1.")
    if picture is not None and Path(picture).suffix.lower() != ".png":
        raise ConfigurationError(f"picture is {picture}; give the name of a .png file.")
    gpu = gpu_named(device) if device is not None else None
    sizes = [gpu.memory] if gpu is not None else _smallest_here()
    if memory is not None:
        sizes = [parse_memory(each) for each in memory.split(",")]
    relative = None if speeds is None else parse_speeds(speeds)
    given = Configuration.of(config)
    asked = {
        "model.model_dir": model_dir,
        "data.sequence_len": sequence_len,
        "trainer.devices": devices,
        "trainer.num_nodes": hosts,
    }
    content = given.read()
    if model_dir is not None:
        content["model"]["model_dir"] = model_dir
    if sequence_len is not None:
        content["data"]["sequence_len"] = sequence_len
    settings = settings_of(content, str(given))
    on_each = devices or settings.devices or max(1, settings.stages // (hosts or settings.hosts))
    settings.hosts = hosts or settings.hosts
    total = on_each * settings.hosts
    if settings.devices != on_each:  # otherwise fit would use those of the machine that it runs on
        asked["trainer.devices"] = on_each
    given_speeds = settings.speeds if relative is None else relative
    for name, row in (("memory", sizes if len(sizes) > 1 else []), ("speeds", given_speeds)):
        if row and len(row) != total:
            raise ConfigurationError(
                f"{name} has {len(row)} values for {total} devices; give one per device, in rank order, or change "
                "devices."
            )
    planner = Planner(
        simulate(settings, gpu),
        micro_batches=settings.micro_batches,
        sequence_len=settings.sequence_len,
        devices=Devices(total, tuple(sizes * total if len(sizes) == 1 else sizes), given_speeds, settings.column_major),
    )
    try:
        report = Report.of(
            planner, settings, given.words, {name: value for name, value in asked.items() if value is not None}
        )
    except ConfigurationError:
        raise
    except Exception as error:  # the model cannot run without weights
        told = str(error).splitlines() or [""]
        raise ConfigurationError(
            f"{settings.model['model_dir']} cannot be planned: its layers cannot be run without weights "
            f"({type(error).__name__}: {told[0]}); run pipelite fit to see whether it fits."
        ) from error
    if picture is not None:
        from lightning_pipelite.planning.pictures import draw

        draw(report, Path(picture))
    return report


def _smallest_here() -> list[int]:
    """Return the bytes of this machine's smallest GPU in a list; empty without a GPU."""
    sizes = (device_memory(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))
    return sorted(size for size in sizes if size is not None)[:1]


def simulate(settings: Settings, gpu: Gpu | None = None) -> Simulation:
    """Build a simulation of the layers, the loss and the optimizer in the configuration.

    Args:
        settings: The configuration's.
        gpu: The GPU to plan for; if not given, this machine's, if it has one, at the speed of REFERENCE.
    """
    model = settings.model
    adapter_class, options = class_of(model["adapter"], "model.adapter", "lightning_pipelite.adapters")
    taken = inspect.signature(CausalLMLayers.__init__).parameters
    options_of_layers = {name: value for name, value in model.items() if name in taken}
    options_of_layers |= {"adapter": adapter_class(**options), "dtype": dtype_of(model), "activation_memory": "keep"}
    layers = CausalLMLayers(
        options_of_layers.pop("model_dir"), fuse_head=True, needs_weights=False, **options_of_layers
    )
    layers.planned_fp8 = None if gpu is None else gpu.fp8 is not None
    optimizer_class, options = class_of(settings.optimizer, "model.optimizer", "torch.optim", ("params", "lr"))
    make_optimizer: Callable[..., Any] = partial(optimizer_class, lr=1e-3, **options)
    if model.get("offload_optimizer"):
        make_optimizer = offload_state(make_optimizer)
    router_loss = layers.router_loss
    return Simulation(
        layers,
        CausalLMLoss(router_loss.coefficient if router_loss else 0.0),
        make_optimizer,
        gpu or REFERENCE,
    )
