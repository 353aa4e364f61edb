"""Reads the weights of a model's safetensors files as if none were quantised, each on demand."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.models.stored.format import Format, Quantised
from lightning_pipelite.models.weight_files import FLOATS, read_header, weight_files

HELD = "BF16"  # dtype of a dequantised weight in files and headers
NO_CODES = FLOATS | {"I64", "BOOL"}  # dtypes of unquantised weights and buffers


class StoredWeights:
    """The weights of a model, by their names in files that are not quantised.

    At first only the headers are read; each weight is read on demand.

    Args:
        model_dir: Directory with safetensors weights.
        stored: The format of the quantised weights; None if there are none.

    Attributes:
        headers: For each file name, the header entries that its weights would have if they were not quantised:
            ``dtype`` and ``shape``. A quantised weight is in the file of its first part.

    Raises:
        ConfigurationError: A file is missing or damaged, or a part of a quantised weight is missing or does not fit.
    """

    def __init__(self, model_dir: Path, stored: Format | None) -> None:
        files = weight_files(model_dir)
        headers = {path.name: read_header(path) for path in files}
        self._paths = {tensor: path for path in files for tensor in headers[path.name]}
        entries = {name: entry for header in headers.values() for name, entry in header.items()}
        self._quantised: dict[str, Quantised] = {}
        self._open: dict[Path, Any] = {}
        try:
            for weight in stored.find(entries, lambda name: self._tensor(name, "cpu")) if stored else ():
                if weight.name in entries and weight.name not in weight.parts:
                    raise ConfigurationError(
                        f"{weight.name} is in the files twice, quantised and unquantised; fetch the model again."
                    )
                self._quantised[weight.name] = weight
            if stored and not self._quantised and all(entry["dtype"] in NO_CODES for entry in entries.values()):
                raise ConfigurationError(
                    f"quantization_config in config.json says {stored.title}, but no weight is quantised; remove it."
                )
        except ConfigurationError as error:
            raise ConfigurationError(f"{model_dir}: {first_line(error)}") from None
        taken = {name for weight in self._quantised.values() for name in (*weight.parts, *weight.unused)}
        self.headers: dict[str, dict[str, dict[str, Any]]] = {
            file: {name: entry for name, entry in header.items() if name not in taken}
            for file, header in headers.items()
        }
        for name, weight in self._quantised.items():
            file = self._paths[weight.parts[0]].name
            self.headers[file][name] = {"dtype": HELD, "shape": list(weight.shape)}

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The header entries of all weights."""
        return {name: entry for header in self.headers.values() for name, entry in header.items()}

    def adds_nothing(self, name: str) -> bool:
        """Return whether this is a bias of zeros beside a quantised weight.

        Some GPTQ packers gave every layer one, even if the model has none.
        """
        beside = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in self._quantised
        return beside and name in self._paths and not self._tensor(name, "cpu").any()

    def leave_out(self, names: Iterable[str]) -> None:
        """Ignore the tensors of these names from now on."""
        for name in names:
            del self.headers[self._paths[name].name][name]

    def read(self, name: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> Tensor:
        """Return a weight: a quantised one dequantised to ``dtype``, any other as stored in the files."""
        weight = self._quantised.get(name)
        if weight is None:
            return self._tensor(name, device)
        made = weight.dequantise([self._tensor(each, device) for each in weight.parts], dtype)
        if tuple(made.shape) != weight.shape:
            raise RuntimeError(f"{name} was dequantised to shape {list(made.shape)}, not {list(weight.shape)}")
        return made

    def can_keep(self, name: str) -> bool:
        """Return whether the weight can be held as stored in the files."""
        return name in self._quantised and self._quantised[name].kept is not None

    def read_kept(self, name: str, device: str | torch.device) -> tuple[Tensor, Any]:
        """Return a weight as stored in the files, see ``Quantised.kept``."""
        weight = self._quantised[name]
        assert weight.kept is not None
        return weight.kept([self._tensor(each, device) for each in weight.parts])

    def on_demand(self, dtype: torch.dtype, device: torch.device, later: Collection[str] = ()) -> dict[str, Any]:
        """Return what transformers takes for a state dict, in which each weight is read only when it is accessed.

        Weights that will be read ``later`` are replaced by expanded NaN, which takes no memory.
        """
        awaited = {name: self._quantised[name].shape for name in later}
        return {name: _OnDemand(self, name, dtype, device, awaited.get(name)) for name in self.entries}

    def _tensor(self, name: str, device: str | torch.device) -> Tensor:
        path = self._paths[name]
        if path not in self._open:  # kept open: with a tensor per expert, headers would be parsed thousands of times
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor.to(device)


class _OnDemand:
    """A weight that is read when it is indexed, as transformers indexes the slices of a safetensors file."""

    def __init__(
        self,
        weights: StoredWeights,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        awaited: tuple[int, ...] | None,
    ) -> None:
        self._weights, self._name, self._dtype, self._device, self._awaited = weights, name, dtype, device, awaited

    def __getitem__(self, index: Any) -> Tensor:
        if self._awaited is not None:
            return torch.full((), math.nan, dtype=self._dtype, device=self._device).expand(self._awaited)
        return self._weights.read(self._name, self._dtype, self._device)[index]
