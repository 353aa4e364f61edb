"""Parameter groups, selected by patterns of parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_pipelite.errors import ConfigurationError

OptimizerFactory = Callable[[Iterable[Any], float], Optimizer]
"""Makes an optimizer from parameter groups and a learning rate, as the classes of torch and optimi do."""


def check_patterns(patterns: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse patterns that are not regular expressions, and groups without options.

    Raises:
        ConfigurationError: If there is one; the message names it.
    """
    for pattern, options in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(
                f"model.parameter_groups: {pattern!r} is not a regular expression ({error})."
            ) from None
        if not options:
            raise ConfigurationError(f"model.parameter_groups: {pattern} has no options; add some, such as lr: 1e-4.")


def group_parameters(
    named: Iterable[tuple[str, Parameter]], patterns: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Put the trainable parameters into groups: first those that match no pattern, then one group per pattern.

    Groups may be empty, so every stage has the same groups, whatever it trains.

    Args:
        named: Names and parameters.
        patterns: For each regular expression, which is searched for in the names, the optimizer options that its group
            overrides. A parameter belongs to the first pattern that matches.
    """
    groups: list[dict[str, Any]] = [{"params": []}, *({"params": [], **options} for options in patterns.values())]
    for name, parameter in named:
        if parameter.requires_grad:
            matching = (i for i, pattern in enumerate(patterns, start=1) if re.search(pattern, name))
            groups[next(matching, 0)]["params"].append(parameter)
    return groups


def make_optimizer(
    factory: OptimizerFactory, lr: float, groups: list[dict[str, Any]], patterns: Iterable[str]
) -> Optimizer:
    """Make the optimizer, and check that it knows all options of the groups.

    Raises:
        ConfigurationError: If it cannot be made, or does not know an option, which torch would ignore.
    """
    try:
        optimizer = factory(groups, lr)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"model.optimizer: {error}") from error
    for pattern, group in zip(["", *patterns], groups, strict=True):
        if unknown := group.keys() - optimizer.defaults.keys() - {"params"}:
            known = ", ".join(sorted(optimizer.defaults))
            raise ConfigurationError(
                f"model.parameter_groups: {pattern} sets {sorted(unknown)[0]}, which is not an option of "
                f"{type(optimizer).__name__}; it has {known}."
            )
    return optimizer
