"""All uses of undocumented parts of transformers: what each is for, and when it can be removed.

Tested with transformers 5.17 to 5.23; pyproject.toml allows later versions, for which
``tests/models/test_transformers_compat.py`` names what is gone. Other files use what is documented, and some attributes
of modules: without those of rotary embeddings (``rope.py``) and routers (``router.py``), a model's class is refused or
tried out. The data package, which knows nothing of models, has its own (``data/template.py``).

* The rules that turn weights on disk into parameters (``conversion_mapping``, ``core_model_loading``) and back: names,
  fused experts, split projections. Export reads and writes one weight at a time, in the layout of the files, whereas
  transformers' own loading and saving hold a whole model. Remove when transformers loads single parameters by name.
* ``no_init_weights``: models on the meta device, and those whose weights are about to be copied in, need no initial
  values; computing them takes longer than all the rest. Remove when ``from_config`` has an option for it.
* ``convert_moe_packed_tensors``: converts MXFP4 to floating point. Remove when torch has a dtype for it.
* ``get_relative_imports``: finds the files that a model's own code imports, so that a copy of the model includes them.
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
    """Return the attention implementation of models of ``config``; None if none has been chosen yet.

    Remove when a configuration has a public attribute for what ``attn_implementation`` sets.
    """
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Set the attention implementation of models of ``config``, unchecked: it may be one that only GPUs have.

    Remove when there is a setter, or ``PreTrainedModel.set_attn_implementation`` works on the meta device.
    """
    config._attn_implementation = name


def loads_by(auto: Any, config: PretrainedConfig) -> bool:
    """Return whether an auto class has a model for ``config``, in transformers' table or in the model's own code.

    Remove when auto classes report it: ``from_config`` builds the model, or raises an error that has other causes too.
    """
    return type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {})


def class_of(auto: Any, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' own class that an auto class builds for ``config``; None if it has none.

    Remove when auto classes report it.
    """
    if type(config) not in auto._model_mapping:
        return None
    found: Any = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def loading_class(
    whole_class: type[PreTrainedModel], build: Callable[..., None], adjust_keys: Callable[[Any, Any], None]
) -> type[PreTrainedModel]:
    """Return ``whole_class`` with another ``__init__``, and with a hook on what ``from_pretrained`` reports.

    Name and module stay: transformers uses them to look up a class's loss and its weight conversions. Remove when
    ``from_pretrained`` takes a model that is already built, and reports what it loaded before it accepts or refuses it.

    Args:
        whole_class: The model's class.
        build: Replaces ``__init__``.
        adjust_keys: Replaces ``_adjust_missing_and_unexpected_keys(self, report)``: may change which keys in the report
            (``missing_keys``, ``unexpected_keys``, ``mismatched_keys``, ``conversion_errors``) count as errors.
    """
    members = {
        "__init__": build,
        "_adjust_missing_and_unexpected_keys": adjust_keys,
        "__module__": whole_class.__module__,
    }
    return type(whole_class.__name__, (whole_class,), members)


def forgive_keys(whole_class: type[PreTrainedModel], model: PreTrainedModel, report: Any) -> None:
    """Remove from a loading report the keys that ``whole_class`` declares harmless, as ``from_pretrained`` would."""
    whole_class._adjust_missing_and_unexpected_keys(model, report)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantise MXFP4 codes [experts, out, blocks, 16] with exponents [experts, out, blocks], and transpose."""
    weight: Tensor = convert_mxfp4(blocks, scales, dtype=dtype)
    return weight


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Load models, within this context, one weight at a time and without reserving memory beforehand.

    By default, transformers reserves a model's size on a GPU before loading it, in full precision where it does not
    quantise the weights itself (FP8, fused experts in 4 bits): several times what a stage then holds, on a card that
    the stage may just fit. Its threads also keep reading weights while earlier ones are being quantised, the whole
    model if they are fast enough. Remove when a model, and not only a quantiser, can say how much it will take.
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
    """Silence, within this context, the 4-bit quantiser's warning that a model without linear layers may be a bug.

    There are none if all are held as stored in the files. Remove when this warning can be turned off separately.
    """
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def mark_initialised(parameter: nn.Parameter | nn.Module) -> None:
    """Mark a parameter as loaded, though no file holds it under this name, while transformers loads a model.

    For a module, this applies to its own parameters.

    Remove when weights that are quantised on assignment no longer count as missing.
    """
    parameter._is_hf_initialized = True  # type: ignore[union-attr]


def has_experts_interface(module: nn.Module) -> bool:
    """Return whether ``module`` holds experts that follow transformers' experts interface.

    Recognised by the attributes that the decorator ``use_experts_implementation`` leaves on an instance. A norm after
    each expert, which one class has, is not covered, nor are experts spread over processes. Remove when the decorator
    marks its classes.
    """
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    special = any(getattr(module, name, False) for name in ("has_post_expert_norm", "_is_expert_parallel"))
    return known and not special


def gate_of_experts(experts: Any, inner: Tensor) -> Tensor:
    """Apply the activation of experts of that interface, plain or gated: [.., inner or 2·inner] to [.., inner]."""
    output: Tensor = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return output


def torch_path(function: Any) -> Callable[..., Any] | None:
    """Return the torch implementation to which ``function`` would fall back if its kernel's package were missing.

    None if it uses no kernel, according to the decorator ``use_kernel_func_from_hub_with_fallback``; if the package
    ``kernels`` is installed, another decorator is around that. Remove when transformers chooses by the tensors' device.
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

    Models pass their positions to transformers' mask builders, or forget to (gpt-oss and others then silently attend
    across documents). Remove when every model passes its positions to the builders.

    Args:
        numbers: Returns which document each token is in, int64 [batch, seq], or None to leave masks unchanged. Masks of
            another length are unchanged too.
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
