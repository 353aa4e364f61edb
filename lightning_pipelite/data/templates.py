"""Chat templates for models that have none, and the reading of others."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError

TEMPLATES = {
    # The words of https://github.com/tatsu-lab/stanford_alpaca, in plain text: it needs no tokens of its own.
    "alpaca": (
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content }}\n\n"
        "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
        "{% elif message.role == 'assistant' %}### Response:\n{{ message.content }}{{ eos_token }}"
        "{% if not loop.last %}\n\n{% endif %}"
        "{% else %}{{ raise_exception('there is no ' ~ message.role ~ ' in this template') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def read_template(given: str) -> str:
    """Give a chat template by its name, from a file, or as it is given.

    Raises:
        ConfigurationError: If it is none of these.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{%" in given or "{{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        names = " or ".join(TEMPLATES)
        raise ConfigurationError(f"data.chat_template {given} is no file: name a .jinja file, or say {names}.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"data.chat_template {given} cannot be read ({error}): correct it.") from error


def refuse_without_tokenizer(directory: Path) -> None:
    """Refuse a model without a tokenizer, where a chat template is to go with it.

    Raises:
        ConfigurationError: If there is none.
    """
    if not any(directory.glob("tokenizer*")):
        raise ConfigurationError(f"{directory} has no tokenizer that chat_template could go with; leave it out.")


def write_template(directory: Path, template: str) -> None:
    """Give the tokenizer in a saved model's directory a chat template, in place of its own."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if written.pop("chat_template", None) is not None:  # where older versions of transformers have it
        path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def no_template(directory: object) -> ConfigurationError:
    """Give the error of a tokenizer without a template, where there are conversations."""
    return ConfigurationError(
        f"The tokenizer of {directory} has no chat template, which conversations need: set data.chat_template to "
        "alpaca, chatml or a .jinja file, or use an instruction-tuned model's tokenizer."
    )


def surely_has_none(directory: Path) -> bool:
    """Tell, by its files alone, whether a tokenizer has no chat template; where that is not sure, it may have one."""
    try:
        written = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    elsewhere = any(directory.glob("*chat_template*")) or "auto_map" in written
    return not elsewhere and not written.get("chat_template")
