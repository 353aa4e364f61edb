"""Reads the weights of a causal LM from disk one at a time, by their names in the model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.base_place import check_base
from lightning_pipelite.models.attention.varlen import OF_TRANSFORMERS
from lightning_pipelite.models.config import read_config
from lightning_pipelite.models.stored.known import refuse_transposed, stored_format
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.models.text_part import TEXT_MODEL_NAMES
from lightning_pipelite.models.transformers_compat import (
    WeightConverter,
    WeightRenaming,
    attention_of,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    set_attention,
)
from lightning_pipelite.models.weight_files import (
    check_weights,
    read_json,
    weight_files,
)
from lightning_pipelite.models.whole_model import WholeModel, whole_model, whole_models

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # by their safetensors names: the dtypes that an adapter can be added to


@dataclass
class Group:
    """Tensors in the files and parameters of the model that transformers converts into each other as a unit.

    Usually one of each; for fused experts, many tensors and one parameter.

    Attributes:
        files: For each tensor in the files, its name after transformers' renamings and the converter pattern that
            matched it, if any.
        parameters: Names of the parameters.
        converter: Converts one into the other; None if only the names differ.
    """

    files: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None


class BaseModel:
    """A Hugging Face causal LM on disk whose weights are read one at a time.

    transformers renames, fuses and splits weights as it loads them. This class applies that mapping in both
    directions: a parameter can be read from the files by its name in the model, and written back in their layout.

    Args:
        directory: Directory with ``config.json`` and safetensors weights.
        trust_remote_code: Run the model's own code, if it has any.

    Attributes:
        build: Builds a model of this class from a configuration.
        config: Configuration of the causal LM; for a multimodal model, that of its text model.
        model: The model on the meta device.
        shapes: Shape of each parameter of the model.
        stored: The quantisation format of the files; None if they are not quantised.
        weights: The weights in the files, dequantised.
        headers: For each weight file, the header entry of each tensor, as it would be without quantisation.
        groups: The :class:`Group` of each parameter that the files hold.

    Raises:
        ConfigurationError: The model is missing, damaged or not a causal LM that transformers ships.
    """

    def __init__(self, directory: str | Path, *, trust_remote_code: bool = False) -> None:
        self.directory = Path(directory)
        check_base(self.directory)
        self.trust_remote_code = trust_remote_code
        self.config, auto = read_config(self.directory, trust_remote_code)
        self.build = partial(auto.from_config, trust_remote_code=trust_remote_code)
        if attention_of(self.config) not in (None, *OF_TRANSFORMERS):
            set_attention(self.config, "eager")  # what it was trained with need not be installed
        if getattr(self.config, "output_router_logits", False):
            self.config.output_router_logits = False  # only needed in training
        if not weight_files(self.directory) and any(self.directory.glob("*.bin")):
            raise ConfigurationError(
                f"{directory} has only pickled weights (.bin); save it with transformers' save_pretrained, which "
                "writes safetensors, and use that copy."
            )
        check_weights(self.directory)
        self.is_text_part = self.config.model_type != read_json(self.directory / "config.json")["model_type"]
        self.model = self.meta_model()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.stored = stored_format(self.directory)
        refuse_transposed(self.stored, self.model, self.directory)
        self.weights = StoredWeights(self.directory, self.stored)
        self.headers = self.weights.headers
        self._file_of = {tensor: name for name, header in self.headers.items() for tensor in header}
        self.key_mapping = TEXT_MODEL_NAMES if auto is AutoModelForCausalLM and self.is_text_part else None
        transforms = get_model_conversion_mapping(self.model, key_mapping=self.key_mapping)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.groups = self._match()
        matched = {file for group in self.groups.values() for file in group.files}
        self.weights.leave_out(filter(self.weights.adds_nothing, self._file_of.keys() - matched))

    @cached_property
    def whole(self) -> WholeModel:
        """The model that transformers loads from the directory; a multimodal one has more than the text model."""
        if not self.is_text_part:
            return WholeModel(self.model, self.model)
        return whole_model(self.directory, self.model, self.trust_remote_code)

    def whole_of(self, names: Iterable[str]) -> WholeModel | None:
        """Return the whole model that ``names`` come from; None if they are the text model's own names."""
        names = list(names)
        wholes = whole_models(self.directory, self.model, self.trust_remote_code) if self.is_text_part else ()
        return next((whole for whole in wholes if whole.is_meant(names)), None)

    def meta_model(self) -> PreTrainedModel:
        """Return a new model on the meta device, in float32."""
        with torch.device("meta"):
            return self.build(self.config, dtype=torch.float32)

    def read(self, group: Group, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return the parameters of ``group`` by name, read from the files, in float32."""
        return self._join(group, {name: self._read_tensor(name, device) for name in group.files})

    def read_parameter(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return the parameter ``name`` of the model in float32.

        Raises:
            ConfigurationError: The files do not hold it.
        """
        return self.read(self.group_of(name), device)[name]

    def group_of(self, name: str) -> Group:
        """Return the group of the parameter ``name``.

        Raises:
            ConfigurationError: The files do not hold it, so it must be tied to another one.
        """
        if name not in self.groups:
            raise ConfigurationError(
                f"the adapter changes {name}, which {self.directory} ties to another weight; use a base whose weights "
                "are not tied."
            )
        return self.groups[name]

    def split(self, group: Group, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the ``parameters`` of ``group`` back into the tensors of the files, by their names there."""
        if group.converter is None:
            (file,), (parameter,) = group.files, group.parameters
            return {file: parameters[parameter]}
        reverse: Any = group.converter.reverse_transform()
        first = ""
        for name in sorted(parameters, key=dot_natural_key):
            renamed, pattern = reverse.rename_source_key(name)
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern, parameters[name])
        split = reverse.convert(first, model=self.model, config=self.model.config)
        split = {name: _only(value) for name, value in split.items()}
        files = {renamed: name for name, (renamed, _) in group.files.items()}
        if split.keys() != files.keys():
            raise ConfigurationError(
                f"{self.directory}: {group.parameters[0]} cannot be written back in the layout of its files; save the "
                "model with transformers' save_pretrained and use that copy."
            )
        return {files[name]: value for name, value in split.items()}

    def check_round_trip(self, group: Group) -> None:
        """Check that reading ``group`` and writing it back reproduces the values in the files.

        Raises:
            ConfigurationError: It does not.
        """
        tensors = {name: self._read_tensor(name, "cpu") for name in group.files}
        for name, value in self.split(group, self._join(group, tensors)).items():
            if not torch.equal(value, tensors[name]):
                raise ConfigurationError(
                    f"{self.directory}: {name} changes when it is read and written back; save the model with "
                    "transformers' save_pretrained and use that copy."
                )

    def _read_tensor(self, name: str, device: str | torch.device) -> Tensor:
        dtype = self.headers[self._file_of[name]][name]["dtype"]
        if dtype not in DTYPES:
            raise ConfigurationError(
                f"{self.directory}: {name} has dtype {dtype}; use a base with floating-point weights."
            )
        return self.weights.read(name, device=device).float()

    def _match(self) -> dict[str, Group]:
        """Group the files' tensors as transformers does when it loads them."""
        wanted = dict.fromkeys(self.shapes, True)
        prefix = self.model.base_model_prefix
        groups: dict[str, Group] = {}
        for name in sorted(self._file_of, key=dot_natural_key):
            first, pattern = rename_source_key(name, self._renamings, self._converters, prefix, wanted)
            renamed, _ = rename_source_key(name, self._renamings, [])
            if first not in wanted and name in wanted:
                first, pattern, renamed = name, None, name
            if first not in wanted:
                continue  # not part of the causal LM: vision, audio, buffers
            group = groups.setdefault(first, Group())
            group.files[name] = (renamed, pattern)
            if pattern is not None:
                group.converter = next(each for each in self._converters if pattern in each.source_patterns)
        by_parameter: dict[str, Group] = {}
        for first, group in groups.items():
            if group.converter is None:
                made = {first: self._shape(next(iter(group.files)))}
            else:
                metas = {name: torch.empty(self._shape(name), device="meta") for name in group.files}
                made = {name: tuple(tensor.shape) for name, tensor in self._join(group, metas, first).items()}
            for name, shape in made.items():
                if self.shapes.get(name) != shape:
                    raise ConfigurationError(
                        f"{self.directory}: {name} has shape {list(shape)} in the files, but config.json implies "
                        f"{list(self.shapes.get(name, ()))}; fetch the model again."
                    )
                by_parameter[name] = group
            group.parameters = list(made)
        return by_parameter

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.headers[self._file_of[name]][name]["shape"])

    def _join(self, group: Group, tensors: dict[str, Tensor], first: str | None = None) -> dict[str, Tensor]:
        """Return the parameters built from ``tensors``, which must be all those of ``group``."""
        first = first or group.parameters[0]
        if group.converter is None:
            return {first: _only(list(tensors.values()))}
        converter: Any = deepcopy(group.converter)
        for name in sorted(group.files, key=dot_natural_key):
            converter.add_tensor(first, name, group.files[name][1], tensors[name])
        made = converter.convert(first, model=self.model, config=self.model.config)
        return {name: _only(value) for name, value in made.items()}


def _only(value: Tensor | Iterable[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    (tensor,) = value
    return tensor
