"""What to run after training: commands with the paths of what it has written."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_pipelite.callbacks import SaveTrained, TimedCheckpoint
from lightning_pipelite.models.weight_files import read_json


def next_steps(trainer: Trainer, base: list[str], asks: Sequence[str]) -> list[str]:
    """Suggest commands for what a training run has written to disk.

    Args:
        trainer: The Trainer after its run.
        base: Options that name the base model, for all commands.
        asks: Options of generate that make the prompt a question, if conversations were learnt; otherwise empty.

    Returns:
        A heading and commands; empty if nothing was written.
    """
    if trainer.fast_dev_run or not trainer.state.finished:  # type: ignore[attr-defined]
        return []
    steps = dict(_with_trained(trainer.callbacks, base, asks))  # type: ignore[attr-defined]
    steps |= _curves(trainer.loggers)
    width = max(map(len, steps.values()), default=0)
    lines = [f"  {command:{width}}  # {purpose}" for purpose, command in steps.items()]
    return ["next:", *lines] if lines else []


def _with_trained(callbacks: Iterable[Callback], base: list[str], asks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the purpose and the text of each command."""
    saved = [Path(each.output_dir) for each in callbacks if isinstance(each, SaveTrained)]
    if not saved:
        checkpoints = [each.last_model_path for each in callbacks if isinstance(each, TimedCheckpoint)]
        for newest in filter(None, checkpoints):
            output = str(_free(Path(newest).with_name("trained")))
            yield "export the trained weights", _command("convert", "--checkpoint", newest, "--output", output)
        return
    for directory in saved:
        adapter, kind = ["--adapter", str(directory)], _kind(directory)
        if kind == "model":
            chat = ["--chat"] if asks else []  # with the template saved with the model
            yield "generate text", _command("generate", "--model_dir", str(directory), *base[2:], *chat)
        elif kind == "LORA":
            merged, gguf = _free(directory.with_name(f"{directory.name}-merged")), _free(directory.with_suffix(".gguf"))
            yield "generate text, and compare with the base model", _command("generate", *base, *adapter, *asks)
            template = asks if len(asks) > 1 else ()
            yield "merge into the base model", _command("merge", *base, *adapter, "--output", str(merged), *template)
            if _is_known_to_llama_cpp(Path(base[1])) and _has_products_alone(directory):
                yield "export for llama.cpp", _command("export-gguf", *base, *adapter, "--output", str(gguf))
        elif kind is not None:
            lora, gguf = _free(directory.with_name(f"{directory.name}-lora")), _free(directory.with_suffix(".gguf"))
            yield "convert to an equivalent LoRA", _command("control-to-lora", *base, *adapter, "--output", str(lora))
            if _is_known_to_llama_cpp(Path(base[1])):
                yield "export for llama.cpp", _command("export-gguf", *base, *adapter, "--output", str(gguf))


def _kind(directory: Path) -> str | None:
    """Return what a directory holds: the type of an adapter, "model", or None if these commands cannot take it."""
    if (directory / "adapter_config.json").is_file():
        return str(read_json(directory / "adapter_config.json").get("peft_type"))
    return "model" if (directory / "config.json").is_file() else None


def _has_products_alone(directory: Path) -> bool:
    """Return whether llama.cpp can apply a LoRA beside its base; others must be merged first."""
    config = read_json(directory / "adapter_config.json")
    return not (config.get("use_dora") or config.get("trainable_token_indices"))


def _is_known_to_llama_cpp(model_dir: Path) -> bool:
    from lightning_pipelite.export.architectures import PERMUTED, PLAIN  # imports gguf, which nothing else here needs

    return read_json(model_dir / "config.json").get("model_type") in {*PLAIN, *PERMUTED}


def _curves(loggers: Iterable[Logger]) -> dict[str, str]:
    """Return the TensorBoard command, one for all runs below a directory."""
    logs = [each.root_dir for each in loggers if isinstance(each, TensorBoardLogger) and Path(each.log_dir).is_dir()]
    return {"view the training curves": shlex.join(["tensorboard", "--logdir", logs[0]])} if logs else {}


def _free(path: Path) -> Path:
    """Return a path that is not taken, as the commands overwrite nothing."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _command(*words: str) -> str:
    return shlex.join(["pipelite", *words])
