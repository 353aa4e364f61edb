"""A LoRA that exists, from which a training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig

from lightning_pipelite.adapters.lora_kinds import check_tensors, read_lora_config
from lightning_pipelite.adapters.low_rank import FILE_PREFIX
from lightning_pipelite.adapters.peft_compat import rank_and_alpha
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.meta_model import MetaModel


class LoRAStart:
    """The tensors of a PEFT directory, by the names and with the scale of the LoRA that is to go on from them.

    Its B are multiplied by what its alpha says, as a LoRA's own scale here follows from its rank alone: it adds the
    same product to each weight.

    Args:
        directory: Of PEFT's files.
        meta_model: The model that the LoRA is for.
        shapes: Of all tensors that the LoRA has, by their names in a file, without what PEFT puts before.
        wanted: The LoRA's own configuration.

    Raises:
        ConfigurationError: The directory holds no LoRA, one of a kind that is not known, or one that differs from
            ``wanted`` in rank, targets or layers, or does not fit the model.
    """

    def __init__(
        self, directory: Path, meta_model: MetaModel, shapes: Mapping[str, torch.Size], wanted: LoraConfig
    ) -> None:
        self._directory = directory
        if not directory.is_dir():
            self._refuse("there is no such directory; give that of a PEFT adapter, or leave init_from out")
        self._config = read_lora_config(directory)
        tensors = read_tensors(directory)
        pairs = check_tensors(self._config, tensors, directory)
        if self._config.target_parameters and (self._config.rank_pattern or self._config.alpha_pattern):
            self._refuse("it has experts and rank_pattern or alpha_pattern; choose one with the same scale everywhere")
        if self._config.use_dora != wanted.use_dora:
            self._refuse(
                f"use_dora is {wanted.use_dora}, but the adapter has {self._config.use_dora}; set use_dora to that"
            )
        self._check_ranks([name.removeprefix(FILE_PREFIX) for name in pairs], wanted.r)
        if rest := sorted(name for name in tensors if ".lora_" not in name or name.endswith(".bias")):
            self._refuse(
                f"it holds {_names(rest)}, which is no part of a LoRA that can be trained here; choose another"
            )
        whole, names = meta_model.whole, [name.removeprefix(FILE_PREFIX) for name in tensors]
        meant = whole.is_meant(
            names
        )  # of a model with images, PEFT's files have its names, former ones the text part's
        found = {(whole.own_name(name) or name) if meant else name: FILE_PREFIX + name for name in names}
        self._check_targets(set(found), set(shapes), meta_model)
        for name, shape in shapes.items():
            if tensors[found[name]].shape != shape:
                self._refuse(
                    f"{name} has shape {list(tensors[found[name]].shape)}, but {meta_model.model_dir} needs "
                    f"{list(shape)}; give an adapter of that model"
                )
            if not tensors[found[name]].isfinite().all():
                self._refuse(f"{name} is not finite; the adapter is broken")
        own_scale = wanted.r**0.5 if wanted.use_rslora else 1.0
        self.tensors = {
            name: tensors[found[name]].float() * (self._scale(found[name]) / own_scale if ".lora_B" in name else 1.0)
            for name in shapes
        }

    def _check_ranks(self, modules: list[str], rank: int) -> None:
        ranks = {rank_and_alpha(self._config, module)[0] for module in modules}
        if len(ranks) > 1:
            self._refuse(
                f"its ranks differ between weights ({min(ranks)} to {max(ranks)}); one of a single rank is needed"
            )
        if ranks != {rank}:
            self._refuse(f"it has rank {ranks.pop()}, but rank is {rank}; set rank to the adapter's")

    def _check_targets(self, found: set[str], wanted: set[str], meta_model: MetaModel) -> None:
        if found == wanted:
            return
        adapted = sorted({_module(name) for name in found if meta_model.layer_of(name) is not None})
        targets = sorted({name.rpartition(".")[2] for name in adapted})
        layers = sorted({meta_model.layer_of(name) for name in adapted}, key=lambda number: number or 0)
        more, less = sorted(found - wanted), sorted(wanted - found)
        what = f"it adapts {_module(more[0])}" if more else f"it does not adapt {_module(less[0])}"
        told = f"{what}, unlike target_modules and layers_to_transform"
        if not targets:
            self._refuse(f"{told}; give an adapter of {meta_model.model_dir}")
        self._refuse(f"{told}; set these to what it has, {', '.join(targets)} of the layers {layers}")

    def _scale(self, name: str) -> float:
        rank, alpha = rank_and_alpha(self._config, name.removeprefix(FILE_PREFIX).partition(".lora_")[0])
        return float(alpha / (rank**0.5 if self._config.use_rslora else rank))

    def _refuse(self, why: str) -> None:
        raise ConfigurationError(f"init_from {self._directory}: {why}.")


def _module(name: str) -> str:
    return name.partition(".lora_")[0]


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
