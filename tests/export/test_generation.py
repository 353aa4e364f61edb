"""``pipelite generate``, against generation by transformers and PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.generation import generate, readable

WORDS = ["<s>", "</s>", "user", "a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("generation")
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="e"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "base"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def test_both_sides(saved: tuple[str, str]) -> None:
    base, adapter = saved
    plain = AutoModelForCausalLM.from_pretrained(base)
    given = torch.tensor([[3, 4]])
    wanted = []
    for model in (plain, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)):
        ids = model.generate(input_ids=given, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, 2:]
        wanted.append(" ".join(WORDS[number] for number in ids if number > 1) or "(nothing)")
    assert wanted[0] != wanted[1]
    shown = generate(base, adapter, "a b", max_new_tokens=6)
    assert shown == f"prompt: a b\n── base\n{wanted[0]}\n── with the adapter\n{wanted[1]}"
    assert generate(base, prompt="a b", max_new_tokens=6) == f"prompt: a b\n── {base}\n{wanted[0]}"


def test_blanks_are_told_from_nothing() -> None:
    assert readable("\n a b \n") == "a b"
    assert readable("\n \n") == "(3 characters, all whitespace; sampling with a temperature of 0.8 may give more)"
    assert readable("") == "(nothing)"


def test_what_is_wrong(saved: tuple[str, str]) -> None:
    base, _ = saved
    with pytest.raises(
        ConfigurationError, match="none is not a directory; give the directory of a local Hugging Face model"
    ):
        generate("none")
    with pytest.raises(ConfigurationError, match=r"has no adapter_config\.json; give the directory of a PEFT adapter"):
        generate(base, base)
    with pytest.raises(ConfigurationError, match="has no chat template; set chat_template, or leave chat out"):
        generate(base, chat=True)
    with pytest.raises(ConfigurationError, match="max_new_tokens must be at least 1"):
        generate(base, max_new_tokens=0)
