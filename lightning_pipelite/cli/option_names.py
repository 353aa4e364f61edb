"""The names of the options of fit, read from the source files, and suggestions for unknown names."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from lightning_pipelite.cli.sections import SECTIONS

OWN = ("config", "seed_everything", "ckpt_path", "weights_only", "overwrite", "print_config", "verbose", "help")
"""Options of fit outside the sections."""

_LORA = "model.adapter.init_args."
FOREIGN = {
    "r": f"{_LORA}rank",
    "lora_r": f"{_LORA}rank",
    "lora_rank": f"{_LORA}rank",
    "lora_dropout": f"{_LORA}dropout",
    "lora_target_modules": f"{_LORA}target_modules",
    "learning_rate": "model.lr",
    "num_train_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_seq_length": "data.sequence_len",
    "max_seq_len": "data.sequence_len",
    "max_length": "data.sequence_len",
    "seq_length": "data.sequence_len",
    "sequence_length": "data.sequence_len",
    "cutoff_len": "data.sequence_len",
    "block_size": "data.sequence_len",
    "max_grad_norm": "trainer.gradient_clip_val",
    "gradient_clipping": "trainer.gradient_clip_val",
    "logging_steps": "trainer.log_every_n_steps",
    "lr_scheduler_type": "model.schedule",
    "model_name_or_path": "model.model_dir",
    "base_model": "model.model_dir",
    "model_name": "model.model_dir",
    "optim": "model.optimizer",
    "seed": "seed_everything",
    "val_set_size": "data.eval_fraction",
    "resume_from_checkpoint": "ckpt_path",
    "attn_impl": "model.attn_implementation",
    "adam_beta1": "model.beta1",
    "adam_beta2": "model.beta2",
    "adam_epsilon": "model.eps",
    "dataset": "data.datasets",
    "dataset_name": "data.datasets",
    "train_file": "data.datasets",
    "data_path": "data.datasets",
    "num_gpus": "trainer.devices",
    "gpus": "trainer.devices",
    "device": "trainer.accelerator",
    "nproc_per_node": "trainer.devices",
    "nnodes": "trainer.num_nodes",
    "torch_dtype": "model.dtype",
    "lr_scheduler": "model.schedule",
    "eval_dataset": "data.eval_datasets",
    "use_double_quant": "model.bnb_4bit_use_double_quant",
    "pipeline_parallel_size": "trainer.strategy.init_args.pipeline_stages",
}
"""Names of options in other trainers, and their names here."""

SENTENCES = {
    "lora_alpha": f"a LoRA's scale is 1 here, as with an alpha equal to the rank: leave it out, and set {_LORA}rank "
    "and model.lr",
    "per_device_train_batch_size": "a micro-batch is one packed sequence: set trainer.accumulate_grad_batches to the "
    "number of sequences per step",
    "load_in_8bit": "set model.load_in_4bit, or model.load_in_fp8 for eight bits",
    "gradient_checkpointing": "set model.activation_memory, which selects what is kept, recomputed or offloaded",
    "warmup_ratio": "set model.warmup_steps to a number of steps",
    "output_dir": "set it as an option of the callback SaveTrained, in trainer.callbacks",
    "save_steps": "add the callback TimedCheckpoint to trainer.callbacks, which saves at intervals of time",
    "bf16": "set model.dtype",
    "eval_steps": "add the callback EvalSchedule to trainer.callbacks, or set trainer.val_check_interval",
    "bnb_4bit_quant_type": "the type is always nf4: leave it out, and set model.load_in_4bit",
    "train_on_inputs": "conversations train on the answers only, plain texts on all tokens: name the fields in "
    "data.datasets",
    "report_to": "set trainer.logger",
    "modules_to_save": "a LoRA adapts linear layers of decoder layers; train whole weights with the adapter Full",
    "weight_decay": "add the callback CompositeWeightDecay to trainer.callbacks, or set it in model.optimizer",
}
SENTENCES |= {
    "alpha": SENTENCES["lora_alpha"],
    "batch_size": SENTENCES["per_device_train_batch_size"],
    "train_batch_size": SENTENCES["per_device_train_batch_size"],
    "micro_batch_size": SENTENCES["per_device_train_batch_size"],
    "fp16": SENTENCES["bf16"],
}
"""Options of other trainers, and what to do here instead."""


@functools.cache
def option_names() -> frozenset[str]:
    """Return the dotted names of all options of fit, except those of classes chosen by name; no slow imports."""
    package = Path(__file__).parent.parent
    lightning = importlib.util.find_spec("lightning")
    assert lightning is not None
    assert lightning.origin is not None
    sources = {
        "trainer": (Path(lightning.origin).parent / "pytorch" / "trainer" / "trainer.py", "Trainer"),
        "model": (package / "module" / "pipelite_module.py", "PipeLiteModule"),
        "data": (package / "data" / "datamodule.py", "PackedDataModule"),
    }
    names = {*OWN, *SECTIONS}
    for section, (path, name) in sources.items():
        names |= {f"{section}.{parameter}" for parameter in _parameters_of(path, name)}
    return frozenset(names)


@functools.cache
def names_of_classes() -> frozenset[str]:
    """Return the dotted names of the options of this package's adapters and strategy, which are chosen by name."""
    package = Path(__file__).parent.parent
    sources = [
        ("model.adapter", package / "adapters" / "lora.py", "LoRA"),
        ("model.adapter", package / "adapters" / "control_adapter.py", "ControlAdapter"),
        ("model.adapter", package / "adapters" / "full.py", "Full"),
        ("trainer.strategy", package / "strategy" / "strategy.py", "PipeLiteStrategy"),
    ]
    return frozenset(
        f"{option}.init_args.{each}" for option, path, name in sources for each in _parameters_of(path, name)
    )


def parameters_of(module: str, function: str) -> dict[str, bool]:
    """Return a function's parameters and whether each is required; only the module's packages are imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    defaults = [None] * (len(found.args.args) - len(found.args.defaults)) + found.args.defaults + found.args.kw_defaults
    names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
    return {name: default is None for name, default in zip(names, defaults, strict=True)}


def _parameters_of(path: Path, name: str) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (init,) = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)][1:]


def meant_by(name: str, known: Iterable[str]) -> str | None:
    """Return what to do instead of giving an unknown option, as part of a sentence; None if nothing is close.

    Args:
        name: The dotted name as given, without leading dashes or a value.
        known: The options that exist.
    """
    known = sorted({*known})
    last = name.rpartition(".")[2]
    if last in SENTENCES and last not in known:
        return SENTENCES[last]
    if last in FOREIGN and (not known or FOREIGN[last] in known or ".init_args." in FOREIGN[last]):
        return f"did you mean {FOREIGN[last]}?"
    same = [each for each in known if each.rpartition(".")[2] == last]
    if len(same) == 1 and len(last) > 1:
        return f"did you mean {same[0]}?"
    near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
    if not near:
        lasts = {each.rpartition(".")[2]: each for each in known}
        near = [lasts[each] for each in difflib.get_close_matches(last, lasts, 1, cutoff=0.8)]
    return f"did you mean {near[0]}?" if near else None
