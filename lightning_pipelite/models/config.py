"""The configuration of a causal LM on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.models.model_type import check_type, refuse_own_code, type_of
from lightning_pipelite.models.stored.known import KEYS
from lightning_pipelite.models.text_part import auto_class
from lightning_pipelite.models.weight_files import read_json


def read_config(model_dir: Path, trust_remote_code: bool) -> tuple[PretrainedConfig, Any]:
    """Read a model directory's config.json.

    Returns:
        The configuration of the causal LM, and the class that builds and loads it like transformers' auto classes.

    Raises:
        ConfigurationError: The file is missing, rejected by transformers, or not that of a trainable causal LM.
    """
    path = model_dir / "config.json"
    type_of(path)
    try:
        config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here: ValueError, KeyError, validation errors
        check_type(path, trust_remote_code=trust_remote_code)
        if not trust_remote_code:
            refuse_own_code(path)
        raise ConfigurationError(f"{path} is rejected by this version of transformers: {first_line(error)}") from error
    whole, text_config = config, config.get_text_config(decoder=True)
    if text_config is not config and text_config.model_type != config.model_type:
        # A multimodal model: use its text model, but take tie_word_embeddings from the outer configuration.
        if "tie_word_embeddings" in read_json(path):
            text_config.tie_word_embeddings = config.tie_word_embeddings
        config = text_config
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        auto = None
    else:
        try:
            auto = auto_class(whole, config, trust_remote_code)
        except Exception as error:
            raise ConfigurationError(
                f"{path}: the text model of type {config.model_type} cannot be trained because its trial as part of a "
                f"model of type {whole.model_type} failed: {first_line(error)}; choose another model."
            ) from error
    if auto is None:
        raise ConfigurationError(f"{path}: model type {config.model_type} is not a causal LM; choose a causal LM.")
    for key in KEYS:  # they describe the files, see stored_format: transformers must not quantise the model in memory
        for described in (whole, config, config.get_text_config(decoder=True)):
            if hasattr(described, key):
                delattr(described, key)
    config.use_cache = False
    return config, auto
