"""Every work-around for DeepSpeed, in one place: what it is for, and when it can be removed.

DeepSpeed is imported only through :func:`load_deepspeed`, once the device is known, and its engine is used only through
:class:`~lightning_pipelite.strategy.engine.PipeLiteEngine`, whose overrides each say what they replace.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_pipelite.shared.verbosity import is_verbose


def load_deepspeed(device: torch.device, local_rank: int) -> None:
    """Import DeepSpeed for a device, and attach it to torch.distributed, which must be initialised.

    * It picks its accelerator once, at import, and takes a GPU wherever it sees one. A CPU run on such a machine needs
      ``DS_ACCELERATOR`` before the first import. Remove when ``deepspeed.initialize`` takes a device.
    * On a CPU it compiles a shared-memory communication op at the first collective, which takes two minutes, needs a
      compiler, and hangs on a stale lock file. gloo does the same work. Remove when the op is optional
      (``deepspeed_shm_comm``).
    * ``PipelineModule`` reads ``LOCAL_RANK`` even with one process. Remove when it takes the device from the caller.
    * It sends one tensor at a time over the default group, which NCCL warns about in every process.
    * It logs dozens of lines that a user can do nothing about.
    """
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    with quiet(), warnings.catch_warnings():
        if not is_verbose():
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
        import deepspeed.comm
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import logger

        if not is_verbose():
            logger.setLevel(logging.ERROR)
        if get_accelerator().device_name() != device.type:
            raise RuntimeError(
                f"DeepSpeed was imported before the strategy and chose {get_accelerator().device_name()!r}; "
                f"set DS_ACCELERATOR={device.type} or import deepspeed later."
            )
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(verbose=False)


def forget_engine(engine: Any) -> None:
    """Release an engine and everything it holds: layers, gradients, and groups that are about to be destroyed.

    DeepSpeed keeps some of this in module-level variables, and engine, module and grid refer to each other. They would
    live until the garbage collector runs, and with them the groups' threads and sockets. Remove when the engine's
    ``destroy()`` releases them.
    """
    import deepspeed.comm.comm
    import deepspeed.utils.groups
    from deepspeed.runtime.pipe import p2p

    deepspeed.comm.comm.cdb = None  # recreated by load_deepspeed, over the process group of that time
    deepspeed.utils.groups.mpu = None
    p2p._grid = p2p._groups = None
    if engine is not None:
        engine.destroy()
        for part in (engine.module, engine.grid, engine):
            part.__dict__.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what DeepSpeed prints to standard output while it builds its module and its groups."""
    if is_verbose():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def pipeline_module(stage: nn.Module, stage_id: int, stages: int, column_major: bool) -> Any:
    """Wrap this rank's stage in DeepSpeed's ``PipelineModule``.

    DeepSpeed's own partitioning by ``parameters`` builds every layer on every rank, and counts trainable parameters
    only. It is therefore given one layer per stage, of which only this rank's is real.
    """
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology

    replicas = torch.distributed.get_world_size() // stages
    topology = (
        ProcessTopology(axes=["data", "pipe"], dims=[replicas, stages])
        if column_major
        else PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
    )
    layers = [stage if index == stage_id else nn.Identity() for index in range(stages)]
    with quiet():
        return PipelineModule(layers=layers, topology=topology, partition_method="uniform")


def engine_config(micro_batches: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    No ``bf16`` block: with it DeepSpeed casts fp32 adapters to bf16; without it every tensor travels in its own dtype.
    The throughput timer is off because it synchronises the device in every micro-batch.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "zero_optimization": {"stage": 0},
    }
