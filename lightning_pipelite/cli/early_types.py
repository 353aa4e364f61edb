"""Checks of the types of values before torch is imported, with jsonargparse, as fit does later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lightning_pipelite.cli.given import NULLS, STRATEGY, ClassOptions, Given, given_options
from lightning_pipelite.cli.signatures import signature_of
from lightning_pipelite.errors import ConfigurationError

_SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "model": "lightning_pipelite.module.pipelite_module.PipeLiteModule",
}
_STRATEGIES = ("pipelite", STRATEGY, "lightning_pipelite.strategy.PipeLiteStrategy")
_SHORT_NAMES = {
    "model.adapter": ("lightning_pipelite.adapters",),
    "trainer.callbacks": ("lightning_pipelite.callbacks", "lightning.pytorch.callbacks"),
}
OUR_ADAPTERS = ("LoRA", "ControlAdapter", "Full")
_MADE_ELSEWHERE = {"model.optimizer": ("params", "lr")}  # supplied by the module


def check_types(words: Sequence[str], *, may_lack: bool = False) -> Given | None:
    """Refuse values of the wrong type, and options that a class does not have.

    Args:
        words: The arguments after the subcommand, whose option names have been checked.
        may_lack: Whether options that fit requires may be missing.

    Returns:
        The given options, with plain values converted to their types; None if more may be given elsewhere.

    Raises:
        ConfigurationError: If fit would refuse an option too.
    """
    from lightning_pipelite.cli.error_messages import explain

    given = given_options(words)
    if given is None:
        return None
    for section, path in _SECTIONS.items():
        of_section = given.section(section)
        typed = _typed(section, path, of_section)
        for name in of_section:
            given.values.pop(f"{section}.{name}")
        given.values |= {f"{section}.{name}": value for name, value in typed.items()}
    for option in ("trainer.strategy", "model.adapter", "model.optimizer"):
        made = given.with_class(option)
        if made is not None:
            given.values[option] = ClassOptions(made.class_path, _typed_of_class(option, made, may_lack))
    adapter = given.with_class("model.adapter")
    name = OUR_ADAPTERS[0] if adapter is None or given.runs_others_code else adapter.class_path  # it may add more
    if "." not in name and name not in OUR_ADAPTERS:
        message = f'Parser key "model.adapter":\n  Expected a dot import path string: {name}'
        raise ConfigurationError(explain(message, {}))
    for callback in given.callbacks or ():
        _typed_of_class("trainer.callbacks", callback, may_lack)
    return given


def _typed(place: str, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to their types with jsonargparse, which reports what is wrong.

    Args:
        place: Dotted name that the options are nested under.
        path: Import path of the class that has them.
        given: Their values, by name.

    Returns:
        The values that are certain, converted, and those whose types are not read here, as they are.

    Raises:
        ConfigurationError: If one has the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_pipelite.cli.error_messages import explain
    from lightning_pipelite.cli.jsonargparse_compat import take_integers_first

    signature = signature_of(path)
    types = signature.types if signature else {}
    known = {name: value for name, value in given.items() if _is_certain(value, types.get(name))}
    others = {name: value for name, value in given.items() if types.get(name) is None and value not in NULLS}
    if not known:
        return others
    parser = ArgumentParser(exit_on_error=False)
    for name in known:
        parser.add_argument(f"--{place}.{name}", type=types[name])
    take_integers_first(parser)
    content: Any = known
    for part in reversed(place.split(".")):
        content = {part: content}
    try:
        made = parser.parse_object(content)
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error), {"fit": parser})) from None
    typed = {name: made[f"{place}.{name}"] for name in known}
    return others | {name: value for name, value in typed.items() if value is not None}


def _is_certain(value: Any, kind: Any) -> bool:
    """Return whether jsonargparse reads a file's value as PyYAML does, unlike ``no``, ``2:4`` and dates."""
    kinds = {kind, *get_args(kind)}
    if kind is None or value is None:
        return False
    if isinstance(value, (list, dict)):
        return all(isinstance(each, str) for each in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, str) or (isinstance(value, (int, float)) and (str not in kinds or type(value) in kinds))


def _typed_of_class(option: str, made: ClassOptions, may_lack: bool) -> dict[str, Any]:
    from lightning_pipelite.cli.error_messages import explain

    path = path_of(option, made)
    signature = signature_of(path) if path else None
    if path is None or signature is None:
        return made.init_args
    made_elsewhere = _MADE_ELSEWHERE.get(option, ())
    for name in made.init_args:
        if name in made_elsewhere or not (name in signature.types or signature.takes_others):
            raise ConfigurationError(explain(f"Parser key \"{option}\":\n  Option '{name}' is not accepted", {}))
    if option == "model.adapter" and not may_lack:
        for name in signature.required:
            if made.init_args.get(name) is None:
                message = f'Parser key "{option}":\n  the following arguments are required: {name}'
                raise ConfigurationError(explain(message, {}))
    return _typed(option, path, made.init_args)


def path_of(option: str, made: ClassOptions) -> str | None:
    """Return the full import path of a class of a known package; None if it is not certain."""
    if option == "trainer.strategy" and made.class_path in _STRATEGIES:
        return STRATEGY
    places = _SHORT_NAMES.get(option, ())
    if "." not in made.class_path:
        found = [path for place in places if signature_of(path := f"{place}.{made.class_path}")]
        return found[0] if len(found) == 1 else None
    return (
        made.class_path if made.class_path.startswith(("lightning.", "lightning_pipelite.", "torch.optim.")) else None
    )
