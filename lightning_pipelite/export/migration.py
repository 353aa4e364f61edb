"""Converts a configuration of qlora-pipe-lite to one of this project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.atomic_output import check_new_file, new_file
from lightning_pipelite.export.commented_yaml import CommentedYaml
from lightning_pipelite.export.former_config import FormerConfig

CALLBACKS = "lightning_pipelite.callbacks"
ADAPTERS = "lightning_pipelite.adapters"
DATASET_KEYS = {"dataset_path", "control_class", "max_tokens", "max_sequences", "drop_tails", "document_suffix"}
# Keys of older versions with no counterpart: only the value that changes nothing is accepted.
ONLY = {
    "lora_weight_decay_type": ("l2", "weight decay is always that of ½‖BA‖²_F"),
    "lora_max_norm": (0, "norms are limited by weight decay alone"),
    "control_adapter_type": ("full", "Control Adapters are always symmetric"),
    "control_class0_lambda": (0, "there is no auxiliary loss for class 0"),
}
SAME = ("max_sequences", "drop_tails", "mix_datasets", "sequence_prefix", "document_prefix", "mask_tokens")


def migrate(config: str, output: str | None = None) -> str | None:
    """Convert a configuration of qlora-pipe-lite to the YAML of `pipelite fit --config`.

    Every key is carried over, with a comment where its meaning has changed. Settings that this project does not
    support, and keys that qlora-pipe-lite never had, are errors.

    Args:
        config: The TOML file.
        output: File to write; must not exist. By default, the YAML is printed.

    Raises:
        ConfigurationError: The file is not TOML, or a key is unknown, of the wrong type, or cannot be carried over.
    """
    if output is not None:
        check_new_file(Path(output))
    text = Migration(Path(config)).yaml()
    if output is None:
        return text.rstrip("\n")
    with new_file(Path(output)) as partial:
        partial.write_text(text, encoding="utf-8")
    return f"{output}: written; start training with pipelite fit --config {output}"


class Migration:
    """The conversion of one configuration.

    Args:
        path: The TOML file.

    Raises:
        ConfigurationError: See :func:`migrate`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._former, self._comments = path, FormerConfig(path), CommentedYaml()
        self._take, self._say = self._former.take, self._comments.say
        self.full = self._take("full_fine_tune", bool, False)
        self.control = self._take("use_control_adapters", bool, False)
        if self.full and self.control:
            raise ConfigurationError(f"{path} sets both full_fine_tune and use_control_adapters; choose one.")
        for key, (value, why) in ONLY.items():
            if key in self._former and self._former.pop(key) != value:
                raise ConfigurationError(f"{path}: {key} has no counterpart ({why}); set it to {value!r} or remove it.")
        self.content: dict[str, Any] = {
            "seed_everything": 0,
            "trainer": self._trainer(),
            "model": self._model(),
            "data": self._data(),
        }
        self._former.require_empty()

    def yaml(self) -> str:
        """Return the YAML, with its comments."""
        head = f"# Converted from {self.path.name} of qlora-pipe-lite by pipelite migrate.\n"
        return head + self._comments.text(self.content)

    def _trainer(self) -> dict[str, Any]:
        self.output_dir = self._take("output_dir", str)
        epochs = self._take("epochs", int, 1)
        self.accumulate = self._take("gradient_accumulation_steps", int, 1)
        self._say("Micro-batches per step on each replica, as before.", "trainer", "accumulate_grad_batches")
        self._say("The norm used for clipping is now that over all stages.", "trainer", "gradient_clip_val")
        return {
            "accelerator": "auto",
            "devices": "auto",
            "max_epochs": epochs,
            "accumulate_grad_batches": self.accumulate,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "strategy": self._class("lightning_pipelite.PipeLiteStrategy", self._strategy()),
            "callbacks": self._callbacks(epochs),
            "logger": self._class(
                "lightning.pytorch.loggers.TensorBoardLogger", {"save_dir": self.output_dir, "name": "logs"}
            ),
        }

    def _strategy(self) -> dict[str, Any]:
        strategy: dict[str, Any] = {"pipeline_stages": self._take("pipeline_stages", int, 1)}
        method = self._take("partition_method", str, "uniform")
        place = ("trainer", "strategy", "init_args", "partition_method")
        if method.lower().startswith("type:"):
            if not re.search(method[5:], "DecoderLayerPipe", re.IGNORECASE):
                raise ConfigurationError(
                    f"{self.path}: partition_method {method!r} balances layers other than decoder layers, but only "
                    "decoder layers are divided among stages here; set it to uniform."
                )
            self._say(f"Was {method!r}: only decoder layers are divided among stages.", *place)
            method = "uniform"
        elif method == "parameters":
            self._say("Frozen parameters now count as well.", *place)
        elif method != "uniform":
            raise ConfigurationError(f"{self.path}: partition_method is {method!r}; set it to uniform or parameters.")
        strategy["partition_method"] = method
        strategy["use_column_major_topology"] = self._take("use_column_major_topology", bool, False)
        return strategy

    def _callbacks(self, epochs: int) -> list[dict[str, Any]]:
        decay = self._take("lora_weight_decay", (int, float), 0.0)
        callbacks: list[dict[str, Any]] = []
        if decay and self.full:
            raise ConfigurationError(
                f"{self.path}: lora_weight_decay is for adapters only; remove it, as full_fine_tune is set."
            )
        if not self.full:
            if decay or self.control:  # listed for Control Adapters even at 0, where it does nothing
                callbacks.append(self._class(f"{CALLBACKS}.CompositeWeightDecay", {"weight_decay": float(decay)}))
            callbacks.append({"class_path": f"{CALLBACKS}.AdapterNorms"})
        timed = {
            "checkpoint_interval_hours": self._take("checkpoint_interval_hours", (int, float), 1),
            "max_checkpoints": self._take("max_checkpoints", int, 3),
            "dirpath": f"{self.output_dir}/checkpoints",
        }
        callbacks.append(self._class(f"{CALLBACKS}.TimedCheckpoint", timed))
        evals = self._take("evals_per_epoch", int, None)
        run = self._take("evals_per_run", int, None)
        if run is not None:
            if evals is not None:
                raise ConfigurationError(f"{self.path} sets both evals_per_epoch and evals_per_run; remove the latter.")
            evals = max(1, round((run - 1) / epochs))
            self._say(f"Was evals_per_run = {run}: one before training, {run - 1} during it.", "trainer", "callbacks")
        callbacks.append(self._class(f"{CALLBACKS}.EvalSchedule", {"evals_per_epoch": 10 if evals is None else evals}))
        callbacks.append(self._class(f"{CALLBACKS}.SaveTrained", {"output_dir": f"{self.output_dir}/trained"}))
        self._say(
            "Runs have no dated directories: checkpoints, logs and the result are in output_dir itself. To resume, add "
            "--ckpt_path last.",
            "trainer",
            "callbacks",
        )
        return callbacks

    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = {"model_dir": self._take("model_dir", str), "adapter": self._adapter()}
        load_in_4bit = self._take("load_in_4bit", bool, False)
        if load_in_4bit and self.full:
            self._say("load_in_4bit, which full_fine_tune ignored, is left out.", "model", "adapter")
        elif load_in_4bit:
            model["load_in_4bit"] = True
        model["lr"] = self._take("lr", (int, float))
        for key, default in (("beta1", 0.9), ("beta2", 0.99), ("eps", 1e-6)):
            model[key] = self._take(key, (int, float), default)
        return model

    def _adapter(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        targets = self._take("target_modules", list, None)
        layers = self._take("layers_to_transform", (str, int), None)
        layers = None if layers is None else str(layers)
        gamma = self._take("control_adapter_gamma", (int, float), None)
        if "control_adapter_sigma" in self._former:
            self._former.pop("control_adapter_sigma")
            self._say("control_adapter_sigma is left out: λ = expm1(±S) has no bound.", "model", "adapter")
        if self.full:
            for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_weight_dtype"):
                if key in self._former:
                    self._former.pop(key)
                    self._say(f"{key}, which full_fine_tune ignored, is left out.", "model", "adapter")
            place = ("model", "adapter", "init_args")
            if targets:
                self._say("Names of modules or their endings; before, any part of a name.", *place, "target_modules")
                options["target_modules"] = targets
            if layers is not None:
                self._say("The embedding, final norm and head are now frozen, too.", *place, "layers_to_transform")
                options["layers_to_transform"] = layers
            return self._class(f"{ADAPTERS}.Full", options)
        options["rank"] = rank = self._take("lora_rank", int)
        alpha = self._take("lora_alpha", (int, float), None)
        if alpha is not None and alpha != rank:
            self._say(
                f"lora_alpha was {alpha}: B·A is no longer scaled by {alpha / rank:g}, but by 1; adjust lr and "
                "weight_decay.",
                "model",
                "adapter",
            )
        options["dropout"] = float(self._take("lora_dropout", (int, float), 0.0))
        options["dtype"] = self._take("lora_weight_dtype", str, "float32")
        if layers is not None:
            options["layers_to_transform"] = layers
        if self.control:
            if targets:
                raise ConfigurationError(f"{self.path}: use_control_adapters takes no target_modules; remove them.")
            options["gamma"] = 0.5 if gamma is None else gamma
            return self._class(f"{ADAPTERS}.ControlAdapter", options)
        if gamma is not None:
            self._say("control_adapter_gamma, which LoRAs ignored, is left out.", "model", "adapter")
        options["target_modules"] = targets or "all-linear"
        return self._class(f"{ADAPTERS}.LoRA", options)

    def _data(self) -> dict[str, Any]:
        length = self._take("sequence_len", int)
        data: dict[str, Any] = {"datasets": self._datasets(length), "sequence_len": length}
        for key in SAME:
            if key in self._former:
                data[key] = self._former.pop(key)
        if "document_suffix" in self._former:
            data["document_suffix"] = self._former.pop("document_suffix")
        data |= self._common
        data["eval_fraction"] = self._take("eval_fraction", (int, float), 0.01)
        self._say("Whole documents are now held out, so that none is in both sets.", "data", "eval_fraction")
        data["eval_gradient_accumulation_steps"] = self._take("eval_gradient_accumulation_steps", int, self.accumulate)
        self._say(
            "Documents packed into one sequence no longer attend to each other, where the model can keep them apart.",
            "data",
            "sequence_len",
        )
        return data

    def _datasets(self, length: int) -> list[dict[str, Any]]:
        datasets = self._take("datasets", list)
        carried: list[dict[str, Any]] = []
        common: dict[str, list[Any]] = {"drop_tails": [], "document_suffix": []}
        for number, dataset in enumerate(datasets, start=1):
            if not isinstance(dataset, dict) or not isinstance(dataset.get("dataset_path"), str):
                raise ConfigurationError(f"{self.path}: dataset {number} has no dataset_path; add it.")
            if unknown := sorted(dataset.keys() - DATASET_KEYS):
                raise ConfigurationError(f"{self.path}: dataset {number} has the unknown key {unknown[0]}; remove it.")
            one = {key: dataset[key] for key in ("dataset_path", "max_tokens", "control_class") if key in dataset}
            if "max_sequences" in dataset:
                one.setdefault("max_tokens", dataset["max_sequences"] * length)
                self._say("A dataset's max_sequences times sequence_len is now its max_tokens.", "data", "datasets")
            if not self.control and one.pop("control_class", None) is not None:
                self._say("control_class is left out: it is for Control Adapters only.", "data", "datasets")
            for key, values in common.items():
                values.append(dataset.get(key))
            carried.append(one)
        self._common = {}
        for key, values in common.items():
            if any(value != values[0] for value in values):
                raise ConfigurationError(f"{self.path}: {key} differs between datasets; make it the same for all.")
            if values and values[0] is not None:
                self._common[key] = values[0]
        return carried

    @staticmethod
    def _class(path: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"class_path": path, "init_args": options} if options else {"class_path": path}
