"""An existing LoRA that a training starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig

from lightning_pipelite.adapters.lora_kinds import ROWS, check_tensors, read_lora_config
from lightning_pipelite.adapters.lora_targets import lora_targets
from lightning_pipelite.adapters.low_rank import FILE_PREFIX
from lightning_pipelite.adapters.peft_compat import rank_and_alpha
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.meta_model import MetaModel


class LoRAStart:
    """The tensors of a PEFT directory, with the names and the scale of the LoRA that is to start from them.

    The directory's scale is multiplied into B, as the scale of a LoRA here follows from its rank alone: the product
    that is added to each weight stays the same.

    Args:
        directory: PEFT's directory.
        meta_model: The model that the LoRA is for.
        shapes: Shapes of all tensors of the LoRA, by their names in a file, without PEFT's prefix.
        wanted: The LoRA's own configuration.
        rows: The tokens whose rows it trains, by the names of embedding and head.

    Attributes:
        tensors: Tensors by their names in a file, without PEFT's prefix; including rows of tokens, if the directory
            has them.

    Raises:
        ConfigurationError: The directory holds no LoRA, one of an unsupported kind, or one that differs from ``wanted``
            in rank, targets or layers, or does not fit the model.
    """

    def __init__(
        self,
        directory: Path,
        meta_model: MetaModel,
        shapes: Mapping[str, torch.Size],
        wanted: LoraConfig,
        rows: Mapping[str, list[int]],
    ) -> None:
        self._directory, self._meta_model = directory, meta_model
        if not directory.is_dir():
            self._refuse("there is no such directory; give the directory of a PEFT adapter, or leave init_from out")
        self._config = read_lora_config(directory)
        tensors = read_tensors(directory)
        pairs = check_tensors(self._config, tensors, directory)
        if self._config.target_parameters and (self._config.rank_pattern or self._config.alpha_pattern):
            self._refuse(
                "it adapts fused experts and sets rank_pattern or alpha_pattern, which is not supported; choose an "
                "adapter with one scale for all weights"
            )
        if self._config.use_dora != wanted.use_dora:
            self._refuse(
                f"use_dora is {wanted.use_dora}, but the adapter has {self._config.use_dora}; set use_dora to match it"
            )
        self._check_ranks([name.removeprefix(FILE_PREFIX) for name in pairs], wanted.r)
        kept = {name for name in tensors if ".lora_" in name or name.endswith(ROWS)}
        if rest := sorted(name for name in tensors if name not in kept or name.endswith(".bias")):
            self._refuse(f"it holds {_names(rest)}, which cannot be trained as part of a LoRA; choose another adapter")
        whole, names = meta_model.whole, [name.removeprefix(FILE_PREFIX) for name in tensors]
        # For a model with images, PEFT's files use that model's names; older ones use the text part's.
        meant = whole.is_meant(names)
        found = {(whole.own_name(name) or name) if meant else name: FILE_PREFIX + name for name in names}
        theirs = {name: self._numbers_of(found[name]) for name in found if name.endswith(ROWS)}
        if not theirs:  # the rows start from the model's
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith(ROWS)}
        self._check_rows(theirs, {f"{name}{ROWS}": numbers for name, numbers in rows.items()})
        self._check_targets({*found} - {*theirs}, {*shapes} - {*theirs})
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
        for name, numbers in theirs.items():
            self.tensors[name] = self.tensors[name][[numbers.index(each) for each in rows[name.removesuffix(ROWS)]]]

    def _numbers_of(self, name: str) -> list[int]:
        said = self._config.trainable_token_indices
        if not isinstance(said, dict):
            return list(said or [])
        module = name.removesuffix(ROWS)
        return next((list(numbers) for key, numbers in said.items() if module.endswith(key)), [])

    def _check_rows(self, theirs: Mapping[str, list[int]], ours: Mapping[str, list[int]]) -> None:
        as_sets = [{name: {*numbers} for name, numbers in each.items()} for each in (theirs, ours)]
        if theirs and as_sets[0] != as_sets[1]:
            said = {name.removesuffix(ROWS).rpartition(".")[2]: numbers for name, numbers in theirs.items()}
            self._refuse(f"it has trained rows of tokens; set trainable_token_indices to the same tokens, {said}")

    def _check_ranks(self, modules: list[str], rank: int) -> None:
        ranks = {rank_and_alpha(self._config, module)[0] for module in modules}
        if len(ranks) > 1:
            self._refuse(
                f"its ranks differ between weights ({min(ranks)} to {max(ranks)}); choose an adapter with a single rank"
            )
        if ranks != {rank}:
            self._refuse(f"it has rank {ranks.pop()}, but rank is {rank}; set rank to the adapter's")

    def _check_targets(self, found: set[str], wanted: set[str]) -> None:
        if found == wanted:
            return
        more, less = sorted(found - wanted), sorted(wanted - found)
        what = f"it adapts {_module(more[0])}" if more else f"it does not adapt {_module(less[0])}"
        told = f"{what}, unlike target_modules and layers_to_transform"
        if not (adapted := self._adapted(found)):
            self._refuse(f"{told}; give an adapter of {self._meta_model.model_dir}")
        layers = sorted({self._meta_model.layer_of(name) or 0 for name in adapted})
        targets = sorted({name.rpartition(".")[2] for name in adapted})
        if {*chain(*lora_targets(self._meta_model, targets, layers))} == adapted:
            self._refuse(f"{told}; set these to match it: {', '.join(targets)} of layers {layers}")
        self._refuse(f"{told}; leave out layers_to_transform, and set target_modules to '{self._pattern(adapted)}'")

    def _adapted(self, found: set[str]) -> set[str]:
        """Return the full names of what the adapter adapts in the decoder layers, as target_modules can name them."""
        linear, experts = (set(names) for names in lora_targets(self._meta_model, "all-linear", None))
        meant = tuple(self._config.target_parameters or ())
        modules = {_module(name).replace(".base_layer", "") for name in found}
        return {
            *(modules & linear),
            *(name for name in experts if name.rpartition(".")[0] in modules and name.endswith(meant)),
        }

    def _pattern(self, names: set[str]) -> str:
        """Return a regular expression for ``names``, which differ between layers."""
        prefix = f"{self._meta_model.layers_name}."
        by_layer: dict[str, list[str]] = {}
        for name in sorted(names):
            number, _, inside = name.removeprefix(prefix).partition(".")
            by_layer.setdefault(number, []).append(inside)
        alike: dict[tuple[str, ...], list[int]] = {}
        for number, insides in by_layer.items():
            alike.setdefault(tuple(insides), []).append(int(number))
        parts = (
            rf"{_one_of(map(str, sorted(layers)))}\.{_one_of(map(re.escape, insides))}"
            for insides, layers in alike.items()
        )
        return re.escape(prefix) + _one_of(parts)

    def _scale(self, name: str) -> float:
        rank, alpha = rank_and_alpha(self._config, name.removeprefix(FILE_PREFIX).partition(".lora_")[0])
        return float(alpha / (rank**0.5 if self._config.use_rslora else rank))

    def _refuse(self, why: str) -> None:
        raise ConfigurationError(f"init_from {self._directory}: {why}.")


def _module(name: str) -> str:
    return name.partition(".lora_")[0]


def _one_of(parts: Iterable[str]) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
