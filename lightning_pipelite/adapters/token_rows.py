"""Rows of the embedding and head that are trained beside a LoRA: of which tokens, in which modules, by which names."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.adapters.lora_targets import ADAPTER
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.rows_apart import ROWS, hold_apart, share

Rows = list[int] | dict[str, list[int]]
"""Numbers of tokens, or those of each module by its name."""
IN_FILE = f"token_adapter.{ROWS}"
_KEY = "trainable_token_indices"


def check_numbers(rows: Rows) -> None:
    """Check what can be checked of the option without the model.

    Raises:
        ConfigurationError: There are no tokens, one is given twice, or a value is not a token's number.
    """
    for numbers in rows.values() if isinstance(rows, dict) else [rows]:
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ConfigurationError(f"{_KEY} has {number!r}; give token ids of 0 or more.")
            if numbers.count(number) > 1:
                raise ConfigurationError(f"{_KEY} has the token {number} twice; give it once.")
        if not numbers:
            raise ConfigurationError(f"{_KEY} names no token; give the ids of some tokens, or leave it out.")
    if not rows:
        raise ConfigurationError(f"{_KEY} names no module; give the ids of some tokens, or leave it out.")


def rows_by_module(rows: Rows, meta_model: MetaModel) -> dict[str, list[int]]:
    """Return the tokens whose rows of the embedding and of the head are trained, by the modules' full names.

    If the model ties the two, only the embedding is named, as the head has the same rows.

    Raises:
        ConfigurationError: A module is neither, a token has no row, or two tied modules are given different tokens.
    """
    ends = (meta_model.embedding_name, meta_model.head_name)
    try:
        known = {name: {name, _last(name), meta_model.whole.module_name(name)} for name in ends}
    except KeyError as error:
        raise _refusal(meta_model, f"the model that transformers loads from its directory has no {error}") from None
    if not isinstance(rows, dict):
        rows = dict.fromkeys(ends, rows)
    found: dict[str, list[int]] = {}
    for name, numbers in rows.items():
        full = next((each for each, names in known.items() if name in names), None)
        if full is None:
            raise ConfigurationError(
                f"{_KEY} names {name}, but only rows of {_last(ends[0])} and {_last(ends[1])} can be trained; name "
                "these, or give one list for both."
            )
        count = meta_model.model.get_submodule(full).weight.shape[0]
        if (largest := max(numbers)) >= count:
            raise ConfigurationError(
                f"{_KEY} has the token {largest}, but {full} of {meta_model.model_dir} has only {count} rows, for "
                f"tokens 0 to {count - 1}; add rows with transformers' resize_token_embeddings, save the model, and "
                "train that one."
            )
        found[full] = numbers
    if meta_model.tied:
        numbers = found.get(ends[0], [])
        if not numbers or found.get(ends[1], numbers) != numbers:
            raise ConfigurationError(
                f"{_KEY} names different tokens for {_last(ends[0])} and {_last(ends[1])}, whose weights are tied in "
                f"{meta_model.model_dir}; give one list for both."
            )
        return {ends[0]: numbers}
    return found


def for_peft(rows: Mapping[str, list[int]], meta_model: MetaModel) -> Rows:
    """Return the rows as PEFT's configuration gives them, by the names of the model that the directory loads as."""
    if meta_model.tied:  # a list applies to the embedding and what is tied to it
        return rows[meta_model.embedding_name]
    names = [name for name, _ in meta_model.whole.model.named_modules()]
    said = {}
    for own, numbers in rows.items():
        full = meta_model.whole.module_name(own)
        unique = [name for name in names if name.endswith(_last(full))] == [full]  # as PEFT searches
        said[_last(full) if unique else full] = numbers
    return said


def hold_rows(model: PreTrainedModel, rows: Mapping[str, list[int]], meta_model: MetaModel, dtype: torch.dtype) -> None:
    """Make the rows trainable in whatever a stage has of the embedding and head."""
    for name, numbers in rows.items():
        if _has_weight(model, name):
            hold_apart(model.get_submodule(name), numbers, dtype)
    # The last stage has the embedding too, under whose name the rows are tied across stages; the first may lack a head.
    if meta_model.tied and rows and _has_weight(model, meta_model.head_name):
        share(model.get_submodule(meta_model.head_name), model.get_submodule(meta_model.embedding_name))


def check_computation(rows: Mapping[str, list[int]], meta_model: MetaModel) -> None:
    """Check on a tiny model that its own code, the rows held apart, and PEFT compute the same with changed rows.

    Raises:
        ConfigurationError: They do not: the class uses its weights in another way, or PEFT leaves out a bias.
    """
    tiny = meta_model.tiny().eval()
    numbers = [1, 3]
    generator = torch.Generator().manual_seed(0)
    tried = dict.fromkeys(rows, numbers)
    values = {name: torch.randn(2, *tiny.get_submodule(name).weight.shape[1:], generator=generator) for name in rows}
    written, apart, wrapped = (copy.deepcopy(tiny) for _ in range(3))
    try:
        with torch.no_grad():
            for name in rows:
                written.get_submodule(name).weight[numbers] = values[name]
            hold_rows(apart, tried, meta_model, torch.float32)
            for name in rows:
                apart.get_submodule(name).get_parameter(ROWS).copy_(values[name])
            _wrap(wrapped, tried, values, meta_model)
            input_ids = torch.tensor([[0, 1, 2, 3, 4, 3]])
            expected, ours, theirs = (
                model(input_ids=input_ids, use_cache=False).logits for model in (written, apart, wrapped)
            )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(meta_model, str(error).splitlines()[0].rstrip(".")) from error
    reasons = ("its code uses their weights in an unsupported way", "PEFT computes something else with them")
    for found, why in zip((ours, theirs), reasons, strict=True):
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            raise _refusal(meta_model, why, _alone(rows, meta_model))


def _wrap(
    model: PreTrainedModel, rows: Mapping[str, list[int]], values: Mapping[str, Tensor], meta_model: MetaModel
) -> None:
    """Wrap the modules of ``model`` as PEFT does."""
    first = None
    for name in [*rows, *([meta_model.head_name] if meta_model.tied else [])]:
        wrapper = TrainableTokensWrapper(
            model.get_submodule(name), ADAPTER, token_indices=rows.get(name, []), tied_adapter=first
        )
        wrapper.set_adapter(ADAPTER)
        if name in rows:
            wrapper.token_adapter.trainable_tokens_delta[ADAPTER].copy_(values[name])
        first = wrapper.token_adapter if meta_model.tied else None
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper)


def check_places(model: nn.Module, rows: Mapping[str, list[int]], meta_model: MetaModel) -> None:
    """Check that PEFT trains the rows of the same modules in ``model``, the whole one.

    Raises:
        ConfigurationError: It does not.
    """
    ours = [*rows, *([meta_model.head_name] if meta_model.tied and rows else [])]
    wanted = {meta_model.whole.module_name(name) for name in ours}
    found = {name for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)}
    if found != wanted:
        raise _refusal(meta_model, f"PEFT would load them into {', '.join(sorted(found)) or 'no module'}")


def _alone(rows: Mapping[str, list[int]], meta_model: MetaModel) -> str:
    """Suggest training the rows of one module alone, where those of both cannot be trained."""
    embedding = meta_model.embedding_name
    return f"or train those of one module, as in {{{_last(embedding)}: {rows[embedding]}}}" if len(rows) > 1 else ""


def _has_weight(model: nn.Module, name: str) -> bool:
    return "weight" in model.get_submodule(name)._parameters


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _refusal(meta_model: MetaModel, why: str, remedy: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"{_KEY}: the rows of tokens cannot be trained in a model of type {meta_model.config.model_type}, as {why}; "
        f"leave it out{', ' * bool(remedy)}{remedy}."
    )
