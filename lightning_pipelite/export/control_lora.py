"""Converts a Control Adapter to a LoRA: exact factors of its multiplicative change to the weights, without an SVD."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from lightning_pipelite.adapters.config_file import CONFIG_FILE
from lightning_pipelite.adapters.control_files import ControlAdapterFile, Transform
from lightning_pipelite.adapters.lora_targets import shortest
from lightning_pipelite.adapters.weight_file import WEIGHTS_FILE
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.atomic_output import new_directory
from lightning_pipelite.export.base import BaseModel
from lightning_pipelite.export.kl_divergence import KLDivergence, measure
from lightning_pipelite.export.lora_files import PREFIX, LoRAOfBase
from lightning_pipelite.export.residual_writers import LayerWriters, Writer, find_writers
from lightning_pipelite.models.fingerprint import fingerprint, record_base
from lightning_pipelite.shared.progress import track
from lightning_pipelite.shared.wording import counted


def control_to_lora(
    base: str,
    adapter: str,
    output: str,
    inverse: bool = False,
    writers: Literal["nearer", "last", "all"] = "nearer",
    trust_remote_code: bool = False,
) -> str:
    """Convert a Control Adapter to a LoRA.

    For each matrix W that writes into the residual stream of a transformed layer, B = Q diag(λ) and A = Qᵀ W with
    λ = expm1(±S), so that W + B A is W multiplied by the matrix that the Control Adapter applies to the layer's delta.
    If attention and MLP are parallel, or more generally if the delta is the sum of these products, the LoRA is
    equivalent to the Control Adapter. If the MLP follows the attention, the LoRA is an approximation: adapting only
    the MLP's matrix ("last") leaves out the attention's part of the delta; adapting the attention's too ("all") changes
    the MLP's input. Both are then measured against the Control Adapter on the base, layer by layer.

    Merging such a LoRA is undone by merging its inverse, made on the merged model with the same ``writers``.

    Args:
        base: Directory of the Hugging Face model that the adapter was trained on (also ``--model_dir``).
        adapter: Directory of the Control Adapter.
        output: Directory to write, in PEFT's LoRA format; must be empty or not exist.
        inverse: Use class -1, the exact inverse, instead of class +1.
        writers: Which matrices that write into a layer's output to adapt: only the "last", "all", or the "nearer" of
            the two.
        trust_remote_code: Run the base's own Python code, if it has any.

    Raises:
        ConfigurationError: The adapter does not fit the base, or no LoRA can do what it does on such a model.
    """
    with new_directory(Path(output), [Path(base), Path(adapter)]) as partial:
        control = ControlAdapterFile(adapter)
        model = BaseModel(base, trust_remote_code=trust_remote_code)
        layers = layers_of(model, control)
        found = find_writers(model.config, list(layers), model.build)
        chosen, told = _choose(found, writers, model, control, inverse)
        _save(partial, model, {name: chosen(each) for name, each in found.items()}, layers, inverse)
        LoRAOfBase(model, partial)  # checks that PEFT finds a place for each weight
    return told


def layers_of(base: BaseModel, control: ControlAdapterFile) -> dict[str, Transform]:
    """Return the transform of each transformed layer, by the layer's full name.

    Raises:
        ConfigurationError: The base lacks one of the layers, or its layers have another width.
    """
    name = control.layers_name
    whole = base.whole_of([name])
    own = name if whole is None else whole.own_name(name)
    layers = {f"{own}.{number}": each for number, each in control.transforms.items()}
    modules = dict(base.model.named_modules())
    for name in layers:
        if name not in modules:
            raise ConfigurationError(
                f"{control.directory} transforms {name}, which {base.directory} does not have; give the adapter's base."
            )
    hidden = base.config.hidden_size
    if control.hidden != hidden:
        raise ConfigurationError(
            f"{control.directory} is for layers of width {control.hidden}, but those of {base.directory} have "
            f"{hidden}; give the adapter's base."
        )
    return layers


class _Last:
    def __call__(self, layer: LayerWriters) -> tuple[Writer, ...]:
        return layer.last


class _All:
    def __call__(self, layer: LayerWriters) -> tuple[Writer, ...]:
        return layer.last + layer.first


def _choose(
    found: dict[str, LayerWriters],
    writers: str,
    base: BaseModel,
    control: ControlAdapterFile,
    inverse: bool,
) -> tuple[_Last | _All, str]:
    """Return which writers of each layer to adapt, and a report on the choice."""
    if not any(each.first for each in found.values()):
        return _Last(), f"Exact: every matrix that writes into the {len(found)} transformed layers is adapted."
    near = measure(base, control, found, inverse=inverse)
    nearer = min(near, key=lambda name: near[name].divergence)
    take = nearer if writers == "nearer" else writers
    lines = [f"No LoRA is exact here. Compared with the Control Adapter on {counted(near[take].tokens, 'token')}:"]
    for name, each in near.items():
        matrices = {"last": "the last matrix of each layer", "all": "all matrices that write into a layer"}[name]
        lines.append(f"  {name:4} ({matrices}): {_told(each)}{'  <- chosen' if name == take else ''}")
    undo = "Merging it undoes a merge made with" if inverse else "To undo a merge of it, use --inverse with"
    lines.append(f"{undo} --writers {take}.")
    return (_Last() if take == "last" else _All()), "\n".join(lines)


def _told(near: KLDivergence) -> str:
    return f"KL divergence {near.divergence:.3g} nats per token ({near.without:.3g} without any adapter)"


def _save(
    directory: Path,
    base: BaseModel,
    writers: dict[str, Sequence[Writer]],
    layers: dict[str, Transform],
    inverse: bool,
) -> None:
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    biased: dict[str, bool] = {}
    todo = [(name, writer) for name, each in writers.items() for writer in each]
    for name, writer in track(todo, "converting", "matrices"):
        left, right = layers[name].factors(inverse=inverse)
        module = writer.weight.rpartition(".")[0]
        there = PREFIX + base.whole.name(module)
        weight = base.read_parameter(writer.weight)
        weight = weight.mT if writer.transposed else weight
        if weight.ndim == 3:
            if writer.bias is not None:
                raise ConfigurationError(
                    f"{base.directory}: the experts {module} have a bias, which a LoRA of experts cannot change; run "
                    "the model with the Control Adapter itself instead."
                )
            count = weight.shape[0]
            a = torch.stack([right @ each for each in weight]).flatten(0, 1)
            b = left[..., None].expand(*left.shape, count).flatten(1)
            parameters.append(writer.weight)
        else:
            a, b = right @ weight, left
            modules.append(module)
            biased[module] = writer.bias is not None
            if writer.bias is not None:
                tensors[f"{there}.lora_B.bias"] = left @ (right @ base.read_parameter(writer.bias))
        tensors[f"{there}.lora_A.weight"] = a.contiguous()
        tensors[f"{there}.lora_B.weight"] = b.contiguous()
    if len(set(biased.values())) > 1:
        raise ConfigurationError(
            f"{base.directory}: some of the matrices that write into a layer have a bias and others do not, which "
            "PEFT's LoRA cannot express; run the model with the Control Adapter itself instead."
        )
    rank = left.shape[1]
    modules, parameters = ([base.whole.name(name) for name in names] for names in (modules, parameters))
    whole = base.whole.model
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=shortest(modules, [name for name, _ in whole.named_modules()], 1) or None,
        target_parameters=shortest(parameters, [name for name, _ in whole.named_parameters()], 3) or None,
        lora_bias=any(biased.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.directory.absolute()),
        inference_mode=True,
    )
    if not modules:
        config.target_modules = set()
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    record_base(directory, fingerprint(base.directory))
    assert (directory / CONFIG_FILE).exists()
