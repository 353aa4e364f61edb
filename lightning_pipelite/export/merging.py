"""Merges adapters into the weights of their base model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightning_pipelite.data.templates import read_template, refuse_without_tokenizer, write_template
from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.export.atomic_output import new_directory
from lightning_pipelite.export.base import DTYPES, BaseModel, Group
from lightning_pipelite.export.lora_files import LoRAOfBase
from lightning_pipelite.export.scales import scales_of
from lightning_pipelite.models.companions import copy_to, everything_else, own_code
from lightning_pipelite.models.fingerprint import refuse_another_base
from lightning_pipelite.models.stored.known import in_plain
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.models.weight_files import INDEX_FILE, read_header, read_json
from lightning_pipelite.shared.progress import Progress
from lightning_pipelite.shared.wording import counted

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes
CHUNK = 1 << 24  # bytes copied at a time


def merge(
    base: str,
    adapter: list[str] | str,
    output: str,
    scale: list[float] | float | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_another_base: bool = False,
    chat_template: str | None = None,
) -> str:
    """Merge one or more LoRAs into the weights of their base model.

    The output has the base's files: the same names, tensors, dtypes and metadata; tokenizer, configuration and
    templates are copied. Sums are computed in float32. Apart from the adapter, only one tensor is in memory at a time
    (the experts of one layer, where transformers fuses them). Quantised weights of a base (MXFP4, FP8, GPTQ and so on)
    are dequantised and written in bfloat16.

    Args:
        base: Directory of the Hugging Face model that the adapters were trained on (also ``--model_dir``).
        adapter: PEFT directory of the adapter, or a list of them.
        output: Directory to write; must be empty or not exist.
        scale: Factor on what the adapter adds, between -2 and 2, 1 by default; a list for several adapters.
        device: Where to compute: cpu or cuda.
        trust_remote_code: Run the base's own Python code, if it has any.
        allow_another_base: Continue with an adapter that was trained on another base.
        chat_template: The training's (data.chat_template), to write with the tokenizer instead of its own.

    Raises:
        ConfigurationError: An adapter does not fit the base, a scale is out of range, or ``output`` is not empty.
    """
    _check_device(device)
    template = None if chat_template is None else read_template(chat_template)
    adapters = [adapter] if isinstance(adapter, str) else adapter
    scales = scales_of(scale, len(adapters))
    with new_directory(Path(output), [Path(base), *map(Path, adapters)]) as partial:
        if template is not None:
            refuse_without_tokenizer(Path(base))
        model = BaseModel(base, trust_remote_code=trust_remote_code)
        for each in adapters if not allow_another_base else ():
            refuse_another_base(Path(each), model.directory)
        loras = [LoRAOfBase(model, each, by, device) for each, by in zip(adapters, scales, strict=True)]
        if len(loras) > 1 and (dora := next((each for each in loras if each.config.use_dora), None)):
            raise ConfigurationError(
                f"{dora.directory} is a DoRA, which cannot be combined with other adapters; merge it alone."
            )
        _check_apart(loras)
        changed = _Changed(model, loras, device)
        write_model(model, partial, changed, "merging")
        changed.check_complete()
        if template is not None:
            write_template(partial, template)
    parameters = {name for each in loras for name in each.changed}
    total = sum(len(header) for header in model.headers.values())
    dequantised = f" The base is in {model.stored.title}; the merged weights are in bfloat16." if model.stored else ""
    return (
        f"{output}: {counted(len(parameters), 'parameter')} changed, {counted(total, 'tensor')} in "
        f"{counted(len(model.headers), 'file')}.{dequantised}"
    )


def _check_apart(loras: list[LoRAOfBase]) -> None:
    """Check that no adapter sets values in a parameter that another changes: the result would depend on the order."""
    for one, other in itertools.permutations(loras, 2):
        if both := sorted(one.sets & other.changed):
            raise ConfigurationError(
                f"{one.directory} replaces values of {both[0]}, which {other.directory} changes too; merge only "
                "one of them."
            )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {device} cannot be used ({first_line(error)}); try cpu.") from None


class _Changed:
    """The tensors of the files that adapters change, each computed on access.

    Tensors that belong together (the experts of a layer in one parameter) are computed together and kept until the last
    of them has been read.
    """

    def __init__(self, base: BaseModel, loras: list[LoRAOfBase], device: str) -> None:
        self._base, self._loras, self._device = base, loras, device
        self._groups: dict[str, Group] = {}
        for name in sorted({name for each in loras for name in each.changed}):
            self._groups.update(dict.fromkeys(base.group_of(name).files, base.group_of(name)))
        self._made: dict[str, Tensor] = {}
        self._checked: set[int] = set()
        self._applied: set[tuple[int, str]] = set()

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._groups

    def __getitem__(self, tensor: str) -> Tensor:
        if tensor not in self._made:
            group = self._groups[tensor]
            if group.converter is not None and id(group.converter) not in self._checked:
                self._base.check_round_trip(group)
                self._checked.add(id(group.converter))
            parameters = self._base.read(group, self._device)
            for name in parameters:
                for number, lora in enumerate(self._loras):
                    if name in lora.changed:
                        parameters[name] = lora.apply(name, parameters[name])
                        self._applied.add((number, name))
            self._made.update(self._base.split(group, parameters))
        return self._made.pop(tensor)

    def check_complete(self) -> None:
        """Check that every parameter that an adapter changes was written."""
        wanted = {(number, name) for number, lora in enumerate(self._loras) for name in lora.changed}
        if wanted != self._applied or self._made:
            raise RuntimeError(f"not merged: {sorted(wanted - self._applied)}")


class Tensors(Protocol):
    """Tensors by name, which may be computed on access."""

    def __contains__(self, name: str, /) -> bool: ...
    def __getitem__(self, name: str, /) -> Tensor: ...


def write_model(base: BaseModel, directory: Path, changed: Tensors, what: str) -> None:
    """Write the base with the ``changed`` tensors in place of its own, and copy everything beside its weights.

    The files match the base's own; for a quantised base, those that it would have in bfloat16.
    """
    with Progress(what, sum(map(len, base.headers.values())), "tensors") as progress:
        for name in base.headers:
            if base.stored is None:
                write_shard(base.directory / name, directory / name, changed, progress)
            else:
                write_dequantised(base.weights, name, directory, changed, progress)
    copy_companions(base.directory, directory)
    if base.stored is not None:
        for name in (INDEX_FILE, "config.json"):
            if (path := directory / name).exists():
                content = read_json(path)
                plain = _index_of(base.weights) if name == INDEX_FILE else in_plain(content, "bfloat16")
                path.write_text(json.dumps({**content, **plain} if name == INDEX_FILE else plain, indent=2) + "\n")


def write_shard(source: Path, target: Path, changed: Tensors, progress: Progress) -> None:
    """Write a copy of a safetensors file, with the same header and the ``changed`` tensors in place of its own.

    Raises:
        ConfigurationError: A changed tensor is not finite in the file's dtype.
    """
    header = read_header(source)
    with source.open("rb") as before, target.open("wb") as after:
        length = before.read(8)
        after.write(length + before.read(int.from_bytes(length, "little")))
        start = after.tell()
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = entry["data_offsets"]
            if name in changed:
                value = changed[name].to("cpu", DTYPES[entry["dtype"]]).contiguous()
                if list(value.shape) != entry["shape"] or value.nbytes != end - first:
                    raise RuntimeError(f"{name} came out as {value.dtype} {list(value.shape)}")
                if not torch.isfinite(value).all():
                    raise ConfigurationError(f"{source}: {name} overflows {entry['dtype']} (in a merge, lower scale).")
                after.seek(start + first)
                after.write(value.reshape(-1).view(torch.uint8).numpy().data)
            else:
                before.seek(start + first)
                after.seek(start + first)
                for left in range(end - first, 0, -CHUNK):
                    after.write(before.read(min(left, CHUNK)))
            progress.advance()


def write_dequantised(weights: StoredWeights, name: str, directory: Path, changed: Tensors, progress: Progress) -> None:
    """Write the file ``name`` of a quantised model dequantised, with the ``changed`` weights in place of its own.

    Raises:
        ConfigurationError: A weight is not finite in the file's dtype.
    """
    entries, end = {}, 0
    for tensor, entry in weights.headers[name].items():
        size = math.prod(entry["shape"]) * SIZES[entry["dtype"]]
        entries[tensor] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with (directory / name).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor, entry in entries.items():
            value = changed[tensor] if tensor in changed else weights.read(tensor)
            if value.is_floating_point():
                value = value.to("cpu", DTYPES[entry["dtype"]])
                if not torch.isfinite(value).all():
                    raise ConfigurationError(f"{name}: {tensor} overflows {entry['dtype']} (in a merge, lower scale).")
            if list(value.shape) != entry["shape"]:
                raise RuntimeError(f"{tensor} came out as {value.dtype} {list(value.shape)}")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            progress.advance()


def _index_of(weights: StoredWeights) -> dict[str, object]:
    sizes = [math.prod(entry["shape"]) * SIZES[entry["dtype"]] for entry in weights.entries.values()]
    weight_map = {tensor: file for file, header in weights.headers.items() for tensor in header}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}


def copy_companions(source: Path, target: Path) -> None:
    """Copy a model's directory except weights, config.json last: without it, an unfinished model does not load."""
    paths = {path.relative_to(source) for path in everything_else(source)} | set(own_code(source))
    copy_to(target, source, sorted(paths, key=lambda path: path.name == "config.json"))
