"""Built-in chat templates for models that have none, and functions to read and write others."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_pipelite.errors import ConfigurationError

TEMPLATES = {
    # The wording of https://github.com/tatsu-lab/stanford_alpaca, in plain text: it needs no special tokens.
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
    """Return the chat template that is given by name, by file, or as its source.

    Raises:
        ConfigurationError: If it is none of these, or the file cannot be read.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{%" in given or "{{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        names = " or ".join(TEMPLATES)
        raise ConfigurationError(f"data.chat_template {given} is not a file: set it to a .jinja file, {names}.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"data.chat_template {given} cannot be read ({error}): correct it.") from error


def refuse_without_tokenizer(directory: Path) -> None:
    """Refuse a model without a tokenizer if a chat template is to be saved with it.

    Raises:
        ConfigurationError: If there is no tokenizer.
    """
    if not any(directory.glob("tokenizer*")):
        raise ConfigurationError(f"{directory} has no tokenizer to save chat_template with; leave chat_template out.")


def write_template(directory: Path, template: str) -> None:
    """Replace the chat template of the tokenizer in a saved model's directory."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if written.pop("chat_template", None) is not None:  # older versions of transformers store it there
        path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def no_template(directory: object) -> ConfigurationError:
    """Return the error for conversations with a tokenizer that has no chat template."""
    return ConfigurationError(
        f"The tokenizer of {directory} has no chat template, which conversations need: set data.chat_template to "
        "alpaca, chatml or a .jinja file, or use an instruction-tuned model's tokenizer."
    )


def surely_has_none(directory: Path) -> bool:
    """Return whether a tokenizer certainly has no chat template, by its files alone; False if in doubt."""
    try:
        written = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    elsewhere = any(directory.glob("*chat_template*")) or "auto_map" in written
    return not elsewhere and not written.get("chat_template")
