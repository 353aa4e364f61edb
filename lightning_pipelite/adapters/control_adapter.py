"""Control Adapters: what a decoder layer adds is scaled along learned directions, or scaled back, by token class."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pipelite.adapters.base import Adapter, to_cpu
from lightning_pipelite.adapters.config_file import CONTROL_ADAPTER
from lightning_pipelite.adapters.directory import whole_directory
from lightning_pipelite.adapters.low_rank import (
    DTYPES,
    FILE_PREFIX,
    generator_of,
    named_as_whole,
)
from lightning_pipelite.adapters.option_ranges import KNOWN_FILES, check_gamma, check_options
from lightning_pipelite.adapters.orthogonal import keep_orthogonal
from lightning_pipelite.adapters.selection import parse_layers
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.control import control
from lightning_pipelite.models.fingerprint import record_base
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in, own_class


class ControlAdapter(Adapter):
    """Trains, for each decoder layer, directions Q and log-scales S that act on what the layer adds.

    With the layer's input h, its output y, d = y - h and the control class c ∈ {-1, 0, +1} of each token::

        y' = y + Q diag(λ) Qᵀ dropout(d),   λ = expm1(c · S)

    Q [hidden, rank] starts with orthonormal columns, and is pulled back towards them after each optimizer step: Q ← Q -
    gamma · Q(QᵀQ - I). S [rank] starts at zero. Class +1 applies I + Q diag(exp(S) - 1) Qᵀ to d, class -1 exactly its
    inverse, class 0 nothing. The method is qlora-pipe-lite's. :class:`~lightning_pipelite.callbacks.
    CompositeWeightDecay` decays S.

    A batch needs ``control_classes``, int64 [batch, sequence]: the class of the token to be predicted at each
    position, as with labels, and 0 at the end and where the label is masked.

    Args:
        rank: Number of directions of each layer.
        dropout: Probability of dropout on d.
        dtype: Dtype of Q and S, and of the computation: "float32", "bfloat16" or "float16".
        gamma: How strongly Q is pulled back to orthogonality after each step: more than 0, at most 0.5.
        layers_to_transform: Decoder layers to adapt, such as "0:3, 7, 12:15" (ranges are inclusive) or a list of
            numbers; all by default.

    Raises:
        ConfigurationError: An option is out of range.
    """

    batch_keys = ("control_classes",)

    def __init__(
        self,
        rank: int,
        dropout: float = 0.0,
        dtype: str = "float32",
        gamma: float = 0.5,
        layers_to_transform: str | list[int] | None = None,
    ) -> None:
        check_options(rank, dropout, dtype)
        check_gamma(gamma)
        self.rank = rank
        self.dropout = dropout
        self.dtype = dtype
        self.gamma = gamma
        self.layers_to_transform = layers_to_transform

    @override
    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        parse_layers(self.layers_to_transform, len(meta_model.layers))
        if meta_model.one_stage_only:
            raise ConfigurationError(
                f"Control Adapters cannot be trained on a model of type {meta_model.config.model_type}, which trains "
                f"in one stage only because {meta_model.one_stage_only}; choose LoRA."
            )
        _ = meta_model.whole  # refused now if it cannot be built: the saved file uses its names
        hidden = _hidden_size(meta_model)
        if self.rank > hidden:
            raise ConfigurationError(f"rank is {self.rank}, but the model's layers are only {hidden} wide; lower rank.")

    @override
    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        model.requires_grad_(False)
        layers = model.get_submodule(meta_model.layers_name)
        for number in parse_layers(self.layers_to_transform, len(meta_model.layers)):
            layer = layers.get_submodule(str(number))
            device = next((parameter.device for parameter in layer.parameters()), None)
            if device is None:  # a placeholder for another stage's layer
                continue
            generator = generator_of(seed, f"{meta_model.layers_name}.{number}")
            q = torch.empty(_hidden_size(meta_model), self.rank, dtype=torch.float32, device="cpu")
            nn.init.orthogonal_(q, generator=generator)
            _control(layer, q.to(device, DTYPES[self.dtype]), self.dropout, model)

    @override
    def after_step(self, model: nn.Module) -> None:
        trained = [p for name, p in model.named_parameters() if name.endswith(".control_Q")]
        keep_orthogonal(trained, self.gamma)

    @override
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {
            FILE_PREFIX + name: to_cpu(parameter)
            for name, parameter in model.named_parameters()
            if name.endswith((".control_Q", ".control_S"))
        }

    @override
    def place(self, directory: Path, meta_model: MetaModel) -> AbstractContextManager[Path]:
        return whole_directory(directory, KNOWN_FILES)

    @override
    def write(self, directory: Path, states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> None:
        weights = named_as_whole(states, meta_model)
        layers = self.layers_to_transform
        config = {
            "peft_type": CONTROL_ADAPTER,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(meta_model.model_dir.absolute()),
            "r": self.rank,
            "lora_alpha": self.rank,  # as qlora-pipe-lite's tools expect: the scale is 1
            "lora_dropout": self.dropout,
            "control_gamma": self.gamma,
            "layers_to_transform": None if layers is None else parse_layers(layers, len(meta_model.layers)),
            "inference_mode": True,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        record_base(directory, meta_model.fingerprint)


def _control(layer: nn.Module, directions: Tensor, dropout: float, model: PreTrainedModel) -> None:
    mix_in(layer, _Controlled)
    layer.control_Q = nn.Parameter(directions)
    layer.control_S = nn.Parameter(torch.zeros_like(directions[0]))
    layer.control_dropout = nn.Dropout(dropout)
    layer._stage_model = [model]  # type: ignore[assignment]  # in a list, so that it is not a submodule of its layer


class _Controlled(Mixin):
    """Mixed into a decoder layer, so that activation checkpointing includes the adapter.

    The classes are read outside the checkpoint and passed into it: by the time of recomputation, the stage may have
    received another micro-batch.
    """

    mixin_place = MixinPlace.CONTROL
    control_Q: nn.Parameter  # noqa: N815  (the name in the file)
    control_S: nn.Parameter  # noqa: N815
    control_dropout: nn.Module
    _stage_model: list[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        extra = self._stage_model[0].extra_inputs
        if len(extra) != 1:
            raise ConfigurationError(
                "a Control Adapter needs control_classes in every batch, but these batches have none; set "
                "control_class for each dataset."
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        version = hidden_states._version
        returned = super().__call__(*args, control_classes=extra[0], **kwargs)  # type: ignore[misc]
        if hidden_states._version != version:
            raise self._refusal()
        return returned

    def forward(self, *args: Any, control_classes: Tensor, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        returned = super().forward(*args, **kwargs)  # type: ignore[misc]
        output = returned[0] if isinstance(returned, tuple) else returned
        if output.shape[:-1] != control_classes.shape:
            raise self._refusal()
        delta = self.control_dropout(output - hidden_states)
        controlled = control(output, delta, self.control_Q, self.control_S, control_classes)
        return (controlled, *returned[1:]) if isinstance(returned, tuple) else controlled

    def _refusal(self) -> ConfigurationError:
        return ConfigurationError(
            f"Control Adapters cannot be trained on a {own_class(self).__name__}: it has several streams of hidden "
            "states, or overwrites its input; choose LoRA."
        )


def _hidden_size(meta_model: MetaModel) -> int:
    return int(meta_model.config.get_text_config(decoder=True).hidden_size)
