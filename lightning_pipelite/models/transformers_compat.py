"""Every part of transformers that it does not document: what it is for, and what to watch for its removal.

Tested with transformers 5.17 to 5.23; pyproject.toml allows more, of which ``tests/models/test_transformers_compat.py``
names what is gone. Other files use what is documented, and some attributes
of modules, without which the class of a model is refused or tried out: those of rotary embeddings (``rope.py``) and of
routers (``router.py``). The data room, which knows no models, has its own (``data/template.py``).

* The rules by which weights on disk become parameters (``conversion_mapping``, ``core_model_loading``) and back: their
  names, fused experts, split projections. Export reads and writes one weight at a time, in the layout of the files,
  where transformers' own loading and saving hold a whole model. Remove when it loads single parameters by name.
* ``no_init_weights``: models on the meta device, and those whose weights are about to be copied in, need no initial
  values, which take longer than all the rest. Remove when ``from_config`` has an option for it.
* ``convert_moe_packed_tensors``: MXFP4 to floating point. Remove when it is one of torch's own types.
* ``get_relative_imports``: which files a model's own code imports, so that a copy of the model has them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_relative_imports
from transformers.initialization import no_init_weights
from transformers.integrations import hub_kernels
from transformers.integrations.mxfp4 import convert_moe_packed_tensors as convert_mxfp4
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)

__all__ = [
    "Concatenate",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "attention_of",
    "class_of",
    "dequantise_mxfp4",
    "dot_natural_key",
    "forgive_keys",
    "gate_of_experts",
    "get_model_conversion_mapping",
    "get_relative_imports",
    "has_experts_interface",
    "loading_class",
    "loads_by",
    "mark_initialised",
    "mask_documents",
    "no_init_weights",
    "nothing_to_quantise",
    "one_at_a_time",
    "rename_source_key",
    "revert_weight_conversion",
    "set_attention",
    "torch_path",
]


def attention_of(config: PretrainedConfig) -> str | None:
    """Return by which implementation models of ``config`` attend; None if nothing has been chosen yet.

    Remove when a configuration has a public attribute for what ``attn_implementation`` sets.
    """
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Let models of ``config`` attend by the implementation ``name``, unchecked: one that exists on a GPU alone, too.

    Remove when there is a setter, or ``PreTrainedModel.set_attn_implementation`` works on the meta device.
    """
    config._attn_implementation = name


def loads_by(auto: Any, config: PretrainedConfig) -> bool:
    """Tell whether an auto class has a model for ``config``, by transformers' table or by the model's own code.

    Remove when auto classes tell it: ``from_config`` builds the model, or raises an error that means other things too.
    """
    return type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {})


def class_of(auto: Any, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of transformers' own that an auto class builds for ``config``; None if it has none.

    Remove when auto classes tell it.
    """
    if type(config) not in auto._model_mapping:
        return None
    found: Any = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def loading_class(
    whole_class: type[PreTrainedModel], build: Callable[..., None], adjust_keys: Callable[[Any, Any], None]
) -> type[PreTrainedModel]:
    """Return ``whole_class`` with another ``__init__``, whose ``from_pretrained`` hands over what it found.

    Name and module stay: transformers looks them up to find a class's loss and its weight conversions. Remove when
    ``from_pretrained`` takes a model that is built, and reports what it loaded before it forgives or refuses.

    Args:
        whole_class: The model's class.
        build: In place of ``__init__``.
        adjust_keys: In place of ``_adjust_missing_and_unexpected_keys(self, report)``: may change what of the load
            (``missing_keys``, ``unexpected_keys``, ``mismatched_keys``, ``conversion_errors``) is an error.
    """
    members = {
        "__init__": build,
        "_adjust_missing_and_unexpected_keys": adjust_keys,
        "__module__": whole_class.__module__,
    }
    return type(whole_class.__name__, (whole_class,), members)


def forgive_keys(whole_class: type[PreTrainedModel], model: PreTrainedModel, report: Any) -> None:
    """Take out of a load's report what ``whole_class`` declares to be no loss, as it does by itself."""
    whole_class._adjust_missing_and_unexpected_keys(model, report)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what MXFP4 codes [experts, out, blocks, 16] and exponents [experts, out, blocks] stand for, transposed."""
    weight: Tensor = convert_mxfp4(blocks, scales, dtype=dtype)
    return weight


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Load models, within this context, one weight at a time and without reserving memory beforehand.

    Left alone, transformers reserves on a GPU what a model takes before it loads it, in full precision where it does
    not quantise itself (FP8, fused experts in 4 bits): several times what a stage then holds, on a card that may just
    fit the stage. And threads of its read weights on while those before are being quantised, all of the model if they
    are fast enough. Remove when a model, and not only a quantiser, can say what it will take.
    """
    variable, reserve = "HF_DEACTIVATE_ASYNC_LOAD", modeling_utils.caching_allocator_warmup
    former = os.environ.get(variable)
    os.environ[variable] = "1"
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = reserve
        if former is None:
            del os.environ[variable]
        else:
            os.environ[variable] = former


@contextlib.contextmanager
def nothing_to_quantise() -> Iterator[None]:
    """Let transformers' 4-bit quantiser find no linear layers, within this context, without a warning of a bug.

    There are none where all are held as the files have them. Remove when its warning can be turned off by itself.
    """
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def mark_initialised(parameter: nn.Parameter | nn.Module) -> None:
    """Tell transformers, while it loads a model, that a parameter has its values though no file held it by this name.

    Of a module, that its own parameters do.

    Remove when what is quantised as it is assigned is no missing weight.
    """
    parameter._is_hf_initialized = True  # type: ignore[union-attr]


def has_experts_interface(module: nn.Module) -> bool:
    """Tell whether ``module`` holds experts that follow transformers' experts interface.

    By what its decorator ``use_experts_implementation`` leaves on an instance. A norm after each expert, which one
    class has, is not covered, nor are experts spread over processes. Remove when the decorator marks its classes.
    """
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    special = any(getattr(module, name, False) for name in ("has_post_expert_norm", "_is_expert_parallel"))
    return known and not special


def gate_of_experts(experts: Any, inner: Tensor) -> Tensor:
    """Return the activation of experts of that interface: gated or plain, [.., inner or 2·inner] to [.., inner]."""
    output: Tensor = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return output


def torch_path(function: Any) -> Callable[..., Any] | None:
    """Return what transformers does in torch where the package that ``function`` takes a kernel from is missing.

    None if it takes none, by what the decorator ``use_kernel_func_from_hub_with_fallback`` knows; with the package
    ``kernels`` there is another one around it. Remove when transformers chooses by the device of the tensors.
    """
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        if getattr(function, "__globals__", None) is vars(hub_kernels):
            known = inspect.getclosurevars(function).nonlocals
            return inner if known["is_new_implementation"] else None
        function = inner
    return None


@cache
def mask_documents(numbers: Callable[[], Tensor | None]) -> None:
    """Make the masks that transformers builds from now on keep apart the documents that ``numbers`` returns.

    Models hand their positions to transformers' mask builders, or forget to (gpt-oss and others then attend across
    documents without a word). Remove when the positions reach the builders from every model.

    Args:
        numbers: Returns which document each token is in, int64 [batch, seq]; None if masks are to be as ever. They also
            are where a mask is of another length.
    """
    for name in ("sdpa", "eager"):
        AttentionMaskInterface.register(name, _document_mask(ALL_MASK_ATTENTION_FUNCTIONS[name], numbers))


def _document_mask(build: Callable[..., Any], numbers: Callable[[], Tensor | None]) -> Callable[..., Any]:
    def build_apart(*args: Any, **kwargs: Any) -> Any:
        documents = numbers()
        lengths = {kwargs.get("q_length"), kwargs.get("kv_length")}
        if documents is None or lengths != {documents.shape[1]}:
            return build(*args, **kwargs)
        kwargs["mask_function"] = and_masks(
            kwargs.get("mask_function", causal_mask_function), packed_sequence_mask_function(documents)
        )
        kwargs["allow_is_causal_skip"] = False
        return build(*args, **kwargs)

    return build_apart
