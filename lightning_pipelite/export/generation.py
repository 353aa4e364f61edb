"""Generates text from a base and from an adapter on it, side by side: for inspection, not for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_pipelite.data.templates import read_template
from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.export.base import BaseModel
from lightning_pipelite.models.fingerprint import refuse_another_base
from lightning_pipelite.models.loading import load_dequantised
from lightning_pipelite.models.stored.known import stored_format

PROMPTS = ("Once upon a time",)


def generate(
    base: str,
    adapter: str | None = None,
    prompt: list[str] | str | None = None,
    max_new_tokens: int = 60,
    chat: bool = False,
    chat_template: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_another_base: bool = False,
) -> str:
    """Continue prompts with a base model, and with an adapter on it, using transformers on one device.

    Args:
        base: Directory of the Hugging Face model (also ``--model_dir``).
        adapter: PEFT directory of a LoRA that was trained on it; by default, only the base generates.
        prompt: The prompt, or a list of prompts.
        max_new_tokens: Maximum number of tokens to generate.
        chat: Treat each prompt as a user's message, formatted by the chat template.
        chat_template: Used instead of the tokenizer's, as data.chat_template; implies chat.
        temperature: 0 takes the most probable token each time; above 0, tokens are sampled.
        seed: Random seed for sampling.
        device: Where to compute: cpu or cuda.
        dtype: Dtype of the weights, such as bfloat16; auto takes that of the files, bfloat16 if they are quantised.
        trust_remote_code: Run the base's own Python code, if it has any.
        allow_another_base: Continue with an adapter that was trained on another base.

    Raises:
        ConfigurationError: The base or the adapter cannot be loaded, or an option is invalid.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigurationError("max_new_tokens must be at least 1, and temperature at least 0.")
    if not Path(base).is_dir():
        raise ConfigurationError(f"{base} is not a directory; give the directory of a local Hugging Face model.")
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ConfigurationError(f"{adapter} has no adapter_config.json; give the directory of a PEFT adapter.")
        if not allow_another_base:
            refuse_another_base(Path(adapter), Path(base))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or PROMPTS)
    tokenizer, model = _load(base, device, dtype, trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if (chat or chat_template is not None) and not tokenizer.chat_template:
        raise ConfigurationError(f"The tokenizer of {base} has no chat template; set chat_template, or leave chat out.")
    texts = [_begin(tokenizer, each, chat or chat_template is not None) for each in prompts]

    def write() -> list[str]:
        torch.manual_seed(seed)
        return [_write(tokenizer, model, text, max_new_tokens, temperature) for text in texts]

    sides = {"base" if adapter is not None else base: write()}
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
        sides["with the adapter"] = write()
    lines = []
    for number, each in enumerate(prompts):
        lines.append(f"prompt: {each}")
        lines += [f"── {side}\n{readable(written[number])}" for side, written in sides.items()]
    return "\n".join(lines)


def readable(text: str) -> str:
    """Return a generated text without surrounding whitespace, or a note if it contains nothing else."""
    if not text:
        return "(nothing)"
    return text.strip() or f"({len(text)} characters, all whitespace; sampling with a temperature of 0.8 may give more)"


def _load(base: str, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    from lightning_pipelite.models.text_part import AUTO_CLASSES
    from lightning_pipelite.models.transformers_compat import loads_by

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        if stored_format(Path(base)) is None:
            config = AutoConfig.from_pretrained(base, **options)
            auto = next((each for each in AUTO_CLASSES if loads_by(each, config)), AUTO_CLASSES[0])
            model = auto.from_pretrained(base, dtype=dtype, **options)
        else:
            model = _dequantised(base, dtype, trust_remote_code)
        model = model.to(device).eval()
    except ConfigurationError:
        raise
    except Exception as error:  # damaged files and remote code may raise anything
        raise ConfigurationError(
            f"{base} cannot be loaded ({first_line(error)}); check the directory and the device."
        ) from error
    return tokenizer, model


def _dequantised(base: str, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import GenerationConfig

    read = BaseModel(base, trust_remote_code=trust_remote_code)
    chosen = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    model = load_dequantised(
        type(read.model), read.weights, config=read.config, dtype=chosen, key_mapping=read.key_mapping
    )
    if (Path(base) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)
    return model


def _begin(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _write(tokenizer: Any, model: Any, ids: list[int], max_new_tokens: int, temperature: float) -> str:
    given = torch.tensor([ids], device=model.device)
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    written = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **drawn,
    )
    return str(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
