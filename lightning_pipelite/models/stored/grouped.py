"""What GPTQ and AWQ have in common: codes, and zero points and scales per group, for each linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.stored.format import Entries, Quantised, misfit

SCALE_TYPES = ["F16", "BF16", "F32"]
CODES, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
OF_MAKING = dict.fromkeys(
    (
        "act_group_aware",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "disable_exllama",
        "exllama_config",
        "hyb_act",
        "lm_head",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "modules_to_not_convert",
        "mse",
        "pad_token_id",
        "static_groups",
        "sym",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
    )
)
"""Keys that say how codes were found, which kernels compute with them, or what is quantised, which the files show."""


def group_size(config: Mapping[str, Any]) -> int | None:
    """Return how many inputs share a scale; None if all of them do.

    Raises:
        ConfigurationError: The number is unusable.
    """
    size = config.get("group_size", 128)
    if size in (-1, None):
        return None
    if not isinstance(size, int) or size < 1:
        raise ConfigurationError(
            f"quantization_config: group_size is {size!r}, not a positive integer or -1; fetch config.json again."
        )
    return size


def find_grouped(entries: Entries, make: Callable[[str], Quantised]) -> Iterator[Quantised]:
    """Yield the result of ``make`` for the name of each linear layer that has codes.

    Raises:
        ConfigurationError: A tensor of the format belongs to no codes, or a layer with codes has an unknown tensor.
    """
    used: set[str] = set()
    for codes in entries:
        if codes.endswith(CODES):
            found = make(codes.removesuffix(CODES))
            used.update(found.parts, found.unused)
            yield found
    for name in sorted(entries.keys() - used):
        if name.endswith((CODES, ZEROS, SCALES, GROUPS)):
            raise misfit(name, f"does not belong to any {CODES.removeprefix('.')}")
        stem, _, end = name.rpartition(".")
        if f"{stem}{CODES}" in used and end not in ("bias", "weight"):
            raise ConfigurationError(
                f"the quantised weight {stem}.weight has an additional tensor {name}, which is not supported; use a "
                "bfloat16 version of the model."
            )


def groups_of(name: str, width: int, size: int | None) -> int:
    """Return the number of groups of a layer's inputs.

    Raises:
        ConfigurationError: The size of groups does not divide the number of inputs.
    """
    if width % (size or width):
        raise misfit(name, f"has {width} inputs, which are not divisible into groups of {size}")
    return width // (size or width)
