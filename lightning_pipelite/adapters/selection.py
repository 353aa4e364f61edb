"""Selects the layers and modules that an adapter is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_pipelite.errors import ConfigurationError


def parse_layers(layers: str | Sequence[int] | None, count: int) -> list[int]:
    """Return the numbers of the chosen decoder layers, sorted, each once.

    Args:
        layers: Numbers and inclusive ranges such as ``"0:3, 7, 12:15"``, a list of numbers, or None for all layers.
        count: How many decoder layers the model has.

    Raises:
        ConfigurationError: An item is neither, the choice is empty, a range is reversed, or there is no such layer.
    """
    if layers is None:
        return list(range(count))
    chosen: set[int] = set()
    for first, last in ranges_of(layers):
        for number in (first, last):
            if not 0 <= number < count:
                raise ConfigurationError(
                    f"layers_to_transform: the model has no decoder layer {number}; its layers are 0 to {count - 1}."
                )
        chosen.update(range(first, last + 1))
    if not chosen:
        raise ConfigurationError("layers_to_transform is empty; name layers or leave it out for all of them.")
    return sorted(chosen)


def ranges_of(layers: str | Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last number of each range, whatever layers the model has.

    Raises:
        ConfigurationError: An item is neither number nor range, or a range is reversed.
    """
    ranges = []
    for item in layers.split(",") if isinstance(layers, str) else map(str, layers):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?::\s*(-?\d+)\s*)?", item)
        if match is None:
            raise ConfigurationError(
                f"layers_to_transform: {item.strip()!r} is neither a number nor a range; write it as in "
                '"0:3, 7, 12:15".'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigurationError(f"layers_to_transform: {item.strip()} is a reversed range; write {last}:{first}.")
        ranges.append((first, last))
    return ranges


def match_modules(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """Return the module names that PEFT's ``target_modules`` would match, in order.

    Args:
        names: Full module names.
        targets: A regular expression for the whole name, or a list of names or of their last components.

    Raises:
        ConfigurationError: A target matches no name, or the regular expression does not compile.
    """
    names = list(names)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigurationError(f"target_modules: {targets!r} is not a regular expression ({error}).") from None
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            raise _no_match(targets, names)
        return matched
    if not targets:
        raise ConfigurationError("target_modules is an empty list; name modules or leave it out.")
    for target in targets:
        if not any(_ends_with(name, target) for name in names):
            raise _no_match(target, names)
    return [name for name in names if any(_ends_with(name, target) for target in targets)]


def refuse_vectors(shapes: Mapping[str, Sequence[int]], targets: str | Sequence[str]) -> None:
    """Refuse a target whose weights in the model's files are all vectors, as those of norms are.

    Args:
        shapes: Shapes of tensors, by their names.
        targets: As in :func:`match_modules`; a regular expression is left to that function.

    Raises:
        ConfigurationError: There is such a target.
    """
    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    for target in targets if not isinstance(targets, str) else ():
        matched = [name for name in modules if _ends_with(name, target)]
        if matched and all(len(modules[name]) == 1 for name in matched):
            first = min(matched, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])
            raise no_linear(first, "which has no matrix")


def no_linear(name: str, what: str) -> ConfigurationError:
    """Return the error for a target that is not a linear module, but ``what``."""
    return ConfigurationError(
        f"target_modules matches {name}, {what}; name only linear modules of decoder layers, or fused experts."
    )


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _no_match(target: str, names: list[str]) -> ConfigurationError:
    known = sorted({last for name in names if (last := name.rpartition(".")[2]) and not last.isdigit()})
    return ConfigurationError(f"target_modules: {target!r} matches no module; the model has {', '.join(known)}.")
