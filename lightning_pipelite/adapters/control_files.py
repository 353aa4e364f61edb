"""Reads Control Adapters from disk: those of this project and those of qlora-pipe-lite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_pipelite.adapters.config_file import CONFIG_FILE, CONTROL_ADAPTER, adapter_settings
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.errors import ConfigurationError

KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(\d+)\.control_(Q|S|A|B)(?:\.weight)?")


def load_control_adapter(directory: str | Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Read a Control Adapter: ``adapter_model.safetensors``, or ``adapter_model.bin`` of qlora-pipe-lite.

    Args:
        directory: Holds the file.

    Returns:
        Q [hidden, rank] and S [rank] of each decoder layer that has them, by its number.

    Raises:
        ConfigurationError: There is no such file, or it holds something else.
    """
    layers = _read_layers(Path(directory))[1]
    for number, parts in layers.items():
        if not _has_directions(parts):
            raise ConfigurationError(
                f"{directory}: layer {number} has {_shapes(parts)}, not control_Q [hidden, rank] and control_S "
                "[rank]; save the adapter again, or choose another."
            )
    return {number: (parts["Q"], parts["S"]) for number, parts in sorted(layers.items())}


@dataclass(frozen=True)
class Transform:
    """A Control Adapter's transform of what one decoder layer adds: d becomes (I + L R) d, or its inverse.

    Attributes:
        left: L [hidden, rank], float32; Q if the file holds Q and S.
        right: R [rank, hidden], float32; Q transposed if the file holds Q and S.
        log_scales: S [rank], float32; None in the older files of qlora-pipe-lite, which hold B = L and A = R.
    """

    left: Tensor
    right: Tensor
    log_scales: Tensor | None = None

    def factors(self, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Return L [hidden, rank] and R [rank, hidden] such that d becomes d + L R d.

        With Q and S, L = Q diag(expm1(±S)) and R = Q transposed: class +1, or class -1 with ``inverse``. With B and A,
        the inverse is exact: (I + B A)⁻¹ = I - B (I + A B)⁻¹ A (Sherman, Morrison and Woodbury), whereas training used
        its first-order approximation, I - B A.
        """
        if self.log_scales is not None:
            return self.left * torch.expm1(-self.log_scales if inverse else self.log_scales), self.right
        if not inverse:
            return self.left, self.right
        middle = torch.eye(self.right.shape[0]) + self.right.double() @ self.left.double()
        return (-self.left.double() @ torch.linalg.inv(middle.double())).float(), self.right


class ControlAdapterFile:
    """A saved Control Adapter.

    Args:
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        layers_name: Name of the base's list of decoder layers, such as ``model.layers``.
        transforms: The :class:`Transform` of each transformed decoder layer, by its number.
        rank: Number of directions of each layer.
        hidden: Width of the layers.

    Raises:
        ConfigurationError: The directory holds no Control Adapter, or a damaged one.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / CONFIG_FILE).exists():
            raise ConfigurationError(f"{directory} has no {CONFIG_FILE}; give an adapter's directory.")
        names, tensors = _read_layers(self.directory)
        if len(names) != 1:
            raise ConfigurationError(f"{directory} has {len(names)} names for its list of layers; one is expected.")
        (self.layers_name,) = names
        self.transforms = {number: self._transform(number, tensors[number]) for number in sorted(tensors)}
        shapes = {each.left.shape for each in self.transforms.values()}
        if len(shapes) != 1:
            raise ConfigurationError(f"{directory} has layers of {len(shapes)} different shapes; one is expected.")
        self.hidden, self.rank = shapes.pop()

    def _transform(self, number: int, parts: dict[str, Tensor]) -> Transform:
        if any(not torch.isfinite(tensor).all() for tensor in parts.values()):
            raise ConfigurationError(f"{self.directory}: layer {number} is not finite; the adapter is broken.")
        parts = {name: tensor.float() for name, tensor in parts.items()}
        if _has_directions(parts):
            return Transform(parts["Q"], parts["Q"].mT, parts["S"])
        if parts.keys() == {"A", "B"} and parts["A"].ndim == 2 and parts["B"].shape == parts["A"].mT.shape:
            return Transform(parts["B"], parts["A"])
        raise ConfigurationError(
            f"{self.directory}: layer {number} has {_shapes(parts)}, not control_Q [hidden, rank] and control_S "
            "[rank]; choose another adapter."
        )


def is_control_adapter(directory: str | Path) -> bool:
    """Tell whether a directory holds a Control Adapter; those of qlora-pipe-lite claim to be LoRAs.

    Raises:
        ConfigurationError: The directory holds no adapter.
    """
    directory = Path(directory)
    if adapter_settings(directory).get("peft_type") == CONTROL_ADAPTER:
        return True
    return any(KEY.fullmatch(key) for key in read_tensors(directory))


def _read_layers(directory: Path) -> tuple[set[str], dict[int, dict[str, Tensor]]]:
    """Return the names given to the list of decoder layers, and the parts of each layer by its number."""
    names: set[str] = set()
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(directory).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ConfigurationError(
                f"{directory} holds {key}, which is not part of a Control Adapter; give the directory of one."
            )
        names.add(match[1])
        layers.setdefault(int(match[2]), {})[match[3]] = tensor
    return names, layers


def _has_directions(parts: Mapping[str, Tensor]) -> bool:
    return parts.keys() == {"Q", "S"} and parts["Q"].ndim == 2 and parts["S"].shape == parts["Q"].shape[1:]


def _shapes(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(f"control_{name} {list(tensor.shape)}" for name, tensor in sorted(parts.items()))
