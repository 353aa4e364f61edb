"""Checks of the values of options before torch is imported, by the rules that are applied again later."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_pipelite.adapters.directory import refuse_other_content
from lightning_pipelite.adapters.option_ranges import KNOWN_FILES, check_gamma, check_options
from lightning_pipelite.adapters.selection import ranges_of, refuse_vectors
from lightning_pipelite.checkpoint.directory import former_of
from lightning_pipelite.checkpoint.manifest import read_manifest
from lightning_pipelite.checkpoint.named import refuse_best, refuse_last
from lightning_pipelite.cli.early_types import OUR_ADAPTERS, check_types, path_of
from lightning_pipelite.cli.given import NULLS, STRATEGY, Given
from lightning_pipelite.cli.sections import LINKS, is_linked
from lightning_pipelite.cli.trainer_options import check_seed, check_trainer_options
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.model_type import check_type
from lightning_pipelite.models.quantization.exclusive import check_weight_options
from lightning_pipelite.models.weight_files import check_weights, refuse_adapter_beside
from lightning_pipelite.module.logged_names import is_logged
from lightning_pipelite.optim.ranges import check_ranges, check_schedule
from lightning_pipelite.shared.local_path import refuse_remote
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy.monitors import refuse_monitor
from lightning_pipelite.strategy.option_ranges import check_method, check_timeout, check_virtual_stages
from lightning_pipelite.strategy.refused_options import KEPT_PRECISION, refuse_options

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
_WATCHING = ("EarlyStopping", "ModelCheckpoint", "TimedCheckpoint")
_SAVING = ("ModelCheckpoint", "TimedCheckpoint")
_PRECISIONS = ("16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


def check_values(words: Sequence[str], *, trains: bool) -> None:
    """Refuse early, by the same rules, what fit or validate would refuse after slow imports.

    What is not read here is left to them.

    Args:
        words: The arguments after the subcommand, whose option names have been checked.
        trains: Whether the command is fit.

    Raises:
        ConfigurationError: If a value has the wrong type or is out of range, values exclude each other, or one names a
            file or directory that is not what it should be.
    """
    later = any(os.environ.get(name, "0") != "0" for name in _RANKS)  # the first process of a job checks for all
    if later or any(word.startswith("--print_config") for word in words):
        return
    given = check_types(words)
    if given is None:
        return
    for target, source in LINKS.items():
        if given.values.get(target) not in NULLS:
            raise ConfigurationError(is_linked(target, source))
    if re.fullmatch(r"-?\d+", str(seed := given.values.get("seed_everything"))):
        check_seed(int(str(seed)))
    _check_trainer(given)
    _check_model(given)
    _check_callbacks(given, trains)
    _check_checkpoint(given)


def _check_trainer(given: Given) -> None:
    options = given.section("trainer")
    strategy = given.with_class("trainer.strategy")
    if strategy is not None and not strategy.init_args and re.fullmatch(r"[a-z_\d]+", strategy.class_path):
        options["strategy"] = strategy.class_path
    if not re.fullmatch(r"[a-z_\d]+", str(options.get("accelerator"))):
        options.pop("accelerator", None)
    if given.runs_others_code:  # it may register names
        options = {name: value for name, value in options.items() if name not in ("strategy", "accelerator")}
    check_trainer_options(options)
    precision = options.get("precision")
    refuse_options(
        precision=precision if precision in _PRECISIONS else KEPT_PRECISION,
        sync_batchnorm=options.get("sync_batchnorm", False) is True,
    )
    devices = options.get("devices")
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    stages = 1
    if strategy is not None and path_of("trainer.strategy", strategy) == STRATEGY:
        stages = strategy.init_args.get("pipeline_stages", 1)
        check_timeout(strategy.init_args.get("timeout", 1.0))
        check_virtual_stages(stages, strategy.init_args.get("virtual_stages", 1))
        check_method(strategy.init_args.get("partition_method", "auto"))
    if isinstance(devices, int) and devices > 0 and "trainer.num_nodes" not in given.unread:
        Topology(devices * options.get("num_nodes", 1), stages)


def _check_model(given: Given) -> None:
    options = given.section("model")
    of_weights = ("load_in_4bit", "load_in_fp8", "bnb_4bit_use_double_quant", "fp8_transpose_cache")
    if not any(f"model.{name}" in given.unread for name in of_weights):
        check_weight_options(**{name: options.get(name, False) for name in of_weights})
    defaults = {"lr": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6}  # all in range
    lr, beta1, beta2, eps = (options.get(name, default) for name, default in defaults.items())
    of_default = given.values.get("model.optimizer") is None
    check_ranges(lr, (beta1, beta2), eps, of_default=of_default or "model.optimizer" in given.unread)
    if "model.schedule" not in given.unread and "model.warmup_steps" not in given.unread:
        check_schedule(options.get("schedule", "rms_ratio"), options.get("warmup_steps", 0))
    adapter = _our_adapter(given)
    own = given.with_class("model.adapter")
    if own is not None and adapter in ("LoRA", "ControlAdapter"):
        of_adapter = {"rank": 1, "dropout": 0.0, "dtype": "float32", **own.init_args}
        check_options(of_adapter["rank"], of_adapter["dropout"], of_adapter["dtype"])
        check_gamma(of_adapter.get("gamma", 0.5))
    if own is not None and adapter is not None and (layers := own.init_args.get("layers_to_transform")) is not None:
        ranges_of(layers)
    model_dir = options.get("model_dir")
    if not isinstance(model_dir, str) or not Path(model_dir).is_dir():
        return
    if not given.runs_others_code:
        check_type(Path(model_dir) / "config.json", trust_remote_code=options.get("trust_remote_code", False))
    refuse_adapter_beside(Path(model_dir))
    headers = check_weights(Path(model_dir), allow_pickled=options.get("allow_pickled_weights", False))
    if own is not None and adapter == "LoRA" and (targets := own.init_args.get("target_modules")):
        tensors = (tensor for header in headers.values() for tensor in header.items())
        refuse_vectors({name: entry.get("shape", ()) for name, entry in tensors}, targets)


def _our_adapter(given: Given) -> str | None:
    """Return the name of the adapter's class if it is one of this package's."""
    adapter = given.with_class("model.adapter")
    path = path_of("model.adapter", adapter) if adapter else None
    module, _, name = (path or "").rpartition(".")
    return name if module.startswith("lightning_pipelite.") and name in OUR_ADAPTERS else None


def _check_callbacks(given: Given, trains: bool) -> None:
    if not given.runs_others_code:  # it may log anything
        for callback in given.callbacks or ():
            name = callback.class_path.rpartition(".")[2]
            monitor, strict = callback.init_args.get("monitor"), callback.init_args.get("strict", True)
            of_lightning = name != "EarlyStopping" and monitor in ("epoch", "step")
            watches = name in _WATCHING and strict is True and not of_lightning
            if watches and isinstance(monitor, str) and not is_logged(monitor):
                refuse_monitor(name, monitor)
    for callback in given.callbacks or ():
        path = path_of("trainer.callbacks", callback) or ""
        name = path.rpartition(".")[2] if path.startswith("lightning_pipelite.callbacks") else ""
        if name == "TimedCheckpoint":
            refuse_remote(callback.init_args.get("dirpath"), "TimedCheckpoint: dirpath")
        output = callback.init_args.get("output_dir")
        if name == "SaveTrained" and isinstance(output, str) and output and trains:
            refuse_remote(output, "SaveTrained: output_dir")
            if _our_adapter(given) in ("LoRA", "ControlAdapter"):
                refuse_other_content(Path(os.path.abspath(output)), KNOWN_FILES)  # noqa: PTH100  (keeps symlinks)


def _check_checkpoint(given: Given) -> None:
    path = given.values.get("ckpt_path")
    if not isinstance(path, str) or path in (*NULLS, "hpc"):
        return
    if path == "best":
        refuse_best()
    if path != "last":
        directory = Path(path)
        read_manifest(former_of(directory) or directory)
        return
    callbacks = given.callbacks
    if callbacks is None or given.runs_others_code:
        return
    named = {each.init_args.get("dirpath") for each in callbacks if each.class_path.rpartition(".")[2] in _SAVING}
    directories = sorted(Path(os.path.realpath(each)) for each in named if isinstance(each, str))
    if len(directories) == len(named) > 0 and not any(each.exists() for each in directories):
        refuse_last(directories)
