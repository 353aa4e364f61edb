"""Rejects quantisation options that exclude each other, or that need another one, without slow imports."""

from lightning_pipelite.errors import ConfigurationError


def check_weight_options(
    *, load_in_4bit: bool, load_in_fp8: bool, bnb_4bit_use_double_quant: bool, fp8_transpose_cache: bool
) -> None:
    """Reject options that contradict each other, or that nothing would use.

    Raises:
        ConfigurationError: Both ways to hold weights are set, or an option of one that is not.
    """
    if load_in_4bit and load_in_fp8:
        raise ConfigurationError("load_in_4bit and load_in_fp8 are mutually exclusive; set one of them to false.")
    if bnb_4bit_use_double_quant and not load_in_4bit:
        raise ConfigurationError(
            "bnb_4bit_use_double_quant applies to weights in 4 bits; set it to false, or load_in_4bit to true as well."
        )
    if fp8_transpose_cache and not load_in_fp8:
        raise ConfigurationError(
            "fp8_transpose_cache applies to weights in FP8; set it to false, or load_in_fp8 to true as well."
        )
