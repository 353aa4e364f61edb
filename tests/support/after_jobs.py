"""What a run leaves behind: in the module, in its layers, and in the process."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_jobs import ROWS, Mlp, data
from lightning_pipelite import PipeLiteStrategy
from stage_jobs import Catchable, trainer_for


class Scaled(nn.Module):
    """A user's module around another, which records the modes it runs in."""

    def __init__(self, inner: nn.Module, modes: list[bool]) -> None:
        super().__init__()
        self.inner, self.modes = inner, modes

    def forward(self, inputs: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.inner(inputs) * 2


class Dropping(L.LightningModule):
    """Layers with dropout and buffers, some of which ``pipeline_layers`` only then creates or wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.modes: list[bool] = []
        self.seen: dict[str, Any] = {}

    def pipeline_layers(self) -> Any:
        first, drop, second, norm, last = self.net
        return [first, drop, nn.Tanh(), Scaled(second, self.modes), norm, last], nn.functional.cross_entropy

    def training_step(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def validation_step(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class During(L.Callback):
    """Inspects the module while it trains, and may end the training."""

    def __init__(self, ends: BaseException | None) -> None:
        self.ends = ends

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            module.seen = {
                "names": list(module.state_dict()),
                "pickles": loads(module.net),
                "copy": [type(layer).__name__ for layer in copy.deepcopy(module.net)],
                "parameters": L.pytorch.utilities.model_summary.ModelSummary(module).total_parameters,
            }
            if self.ends is not None:
                raise self.ends


def loads(module: nn.Module) -> bool:
    """Return whether a module can be pickled whole and comes back with its weights."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    pairs = zip(module.state_dict().values(), again.state_dict().values(), strict=True)
    return all(a.is_meta or torch.equal(a, b) for a, b in pairs)


def after_fit(ends: str, stages: int, virtual_stages: int = 1) -> dict[str, Any]:
    """Return what is found in the module during a fit and after it."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    module = Dropping()
    names, types = list(module.state_dict()), [type(layer) for layer in module.net]
    error = {"ends": None, "error": ValueError("enough"), "interrupt": KeyboardInterrupt()}[ends]
    strategy = Catchable(stages, virtual_stages=virtual_stages)
    trainer = trainer_for(strategy, stages, max_epochs=1, callbacks=[During(error)], num_sanity_val_steps=0)
    try:
        trainer.fit(module, DataLoader(data(20), ROWS), DataLoader(data(8), ROWS))
    except (ValueError, SystemExit):
        pass
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    module.trainer = None
    draws = []
    here = [layer for layer in module.net if not any(p.is_meta for p in layer.parameters())]
    for _ in range(3):
        here[0](torch.zeros(2, 6 if here[0] is module.net[0] else 8))
        draws.append(float(torch.rand(())))
    return {
        "names": list(module.state_dict()) == names,
        "names in the fit": module.seen["names"] == names,
        "parameters in the fit": module.seen["parameters"] - sum(p.numel() for p in module.parameters()),
        "pickles in the fit": module.seen["pickles"],
        "copied in the fit": module.seen["copy"] == [kind.__name__ for kind in types],
        "types": [type(layer) for layer in module.net] == types,
        "attributes": sorted(key for m in module.net.modules() for key in vars(m) if "pipelite" in key),
        "pickles": loads(module),
        "copies": list(copy.deepcopy(module).state_dict()) == names,
        "draws": len(set(draws)),
        "here": [int(name) for name, layer in module.net.named_children() if layer in here and [*layer.parameters()]],
        "modes": sorted(set(module.modes)),
        "told": [message for message in told if "own stage" in message],
    }


def weights_after(strategy: str) -> dict[str, Tensor]:
    """Return the weights in the module itself after a fit, under its own names."""
    chosen: Any = PipeLiteStrategy() if strategy == "pipelite" else strategy
    module = Mlp()
    trainer_for(chosen, 1, max_epochs=1).fit(module, DataLoader(data(20), batch_size=ROWS))
    fresh = Mlp()
    fresh.load_state_dict(module.state_dict())
    return {name: tensor.detach() for name, tensor in fresh.state_dict().items()}


class Made(Mlp):
    """Creates its layers in ``pipeline_layers`` and has none itself."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def pipeline_layers(self) -> Any:
        torch.manual_seed(1)
        return [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)], nn.functional.cross_entropy


def layers_of_its_own_making(stages: int) -> list[float]:
    """Fit and evaluate twice: what was trained must stay with the module. Return the losses."""
    module = Made()
    losses = []
    for _ in range(2):
        trainer = trainer_for(PipeLiteStrategy(stages), stages, max_epochs=1)
        trainer.fit(module, DataLoader(data(40), batch_size=ROWS))
        again = trainer_for(PipeLiteStrategy(stages), stages)
        losses.append(again.validate(module, DataLoader(data(20), batch_size=ROWS), verbose=False)[0]["eval/loss"])
    return losses


def what_is_open() -> tuple[int, int, int]:
    """Count the threads, the open files and sockets, and the process groups of this process."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    process = Path("/proc/self")
    return len([*(process / "task").iterdir()]), len([*(process / "fd").iterdir()]), len(groups)


def runs(stages: int, replicas: int, virtual_stages: int = 1) -> dict[str, Any]:
    """Run ten fits, some of which fail, each with a validation; return what is open after each, and live modules."""
    opened, modules = [], []

    class Fail(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise ValueError("enough")

    def run(number: int) -> None:
        module = Mlp()
        modules.append(weakref.ref(module))
        callbacks = [Fail()] if number % 3 == 1 else []
        processes = stages * replicas
        strategy = Catchable(stages, virtual_stages=virtual_stages)
        trainer = trainer_for(strategy, processes, max_steps=1, callbacks=callbacks, num_sanity_val_steps=0)
        with contextlib.suppress(ValueError):
            trainer.fit(module, DataLoader(data(16), batch_size=ROWS))
        modules.append(weakref.ref(trainer.strategy.stage))
        trainer.validate(module, DataLoader(data(8), batch_size=ROWS), verbose=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    for number in range(10):
        run(number)
        opened.append(what_is_open())
    deadline, alive = time.monotonic() + 10, 1
    while alive and time.monotonic() < deadline:  # the last watchdog waits for the other ranks to exit
        gc.collect()
        alive = sum(reference() is not None for reference in modules)
        time.sleep(0.1)
    return {"opened": opened, "alive": alive}


def optimizers_of_the_run_before() -> list[bool]:
    """Fit one module three times, with a new trainer each; return whether each fit found the optimizer before alive."""
    found: list[bool] = []
    before: list[weakref.ref[Any]] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            found.extend(reference() is not None for reference in before)
            before[:] = [weakref.ref(trainer.optimizers[0])]

    module = Mlp()
    gc.disable()  # chance must not collect it
    try:
        for _ in range(3):
            trainer = trainer_for(PipeLiteStrategy(), 1, max_steps=2, callbacks=[Look()])
            trainer.fit(module, DataLoader(data(16), batch_size=ROWS))
    finally:
        gc.enable()
    return found


def under_another_strategy() -> tuple[list[tuple[int, int, int]], float]:
    """Fit the same module in turn under the strategy and DDP; a process group of the user's must keep working."""
    torch.distributed.init_process_group("gloo")
    mine = torch.distributed.new_group()
    module, opened = Mlp(), []
    for strategy in (PipeLiteStrategy(), "ddp", PipeLiteStrategy(), "ddp"):
        trainer_for(strategy, 1, max_steps=2).fit(module, DataLoader(data(16), batch_size=ROWS))
        opened.append(what_is_open())
    number = torch.ones(())
    torch.distributed.all_reduce(number, group=mine)
    return opened, float(number)


def run_the_example(code: str) -> int:
    """Run the example in the strategy's docstring; return its number of steps."""
    names: dict[str, Any] = {"L": L, "nn": nn, "torch": torch, "PipeLiteStrategy": PipeLiteStrategy}
    torch.manual_seed(0)
    names["loader"] = DataLoader(
        torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(3, (64,))), batch_size=2
    )
    exec(code.replace("L.Trainer(", "L.Trainer(logger=False, enable_checkpointing=False, accelerator='cpu', "), names)
    return int(names["trainer"].global_step)


def device_memory_after_runs(accelerator: str) -> list[int]:
    """Return the allocated GPU memory after each of four fits with a validation, once their modules are deleted."""
    held = []
    for _ in range(4):
        trainer = L.Trainer(
            strategy=Catchable(1), accelerator=accelerator, devices=1, max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Mlp()
        trainer.fit(module, DataLoader(data(16), batch_size=ROWS))
        trainer.validate(module, DataLoader(data(8), batch_size=ROWS), verbose=False)
        assert all(parameter.device.type == "cpu" for parameter in module.parameters())
        del trainer, module
        gc.collect()
        held.append(torch.cuda.memory_allocated() if accelerator == "gpu" else 0)
    return held
