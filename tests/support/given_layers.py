"""A tiny causal LM with its own code, whose layers receive the embedded tokens next to the hidden states."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from own_code import change
from tiny_models import CONFIGS

_CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class GivenConfig(LlamaConfig):
    model_type = "given"


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.own, self.other = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.returns_given = config.returns_given

    def forward(self, hidden_states, given=None):
        output = hidden_states + self.own(hidden_states).tanh()
        if given is not None:
            output = output + self.other(given).tanh()
        return (output, given) if self.returns_given else output


class GivenForCausalLM(LlamaForCausalLM):
    config_class = GivenConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids, position_ids=None, use_cache=None):
        hidden = given = self.model.embed_tokens(input_ids)
        if self.config.returns_given == "positions":
            given = torch.linspace(0, 1, hidden.shape[-1]).expand_as(hidden)
        for number, layer in enumerate(self.model.layers):
            if self.config.returns_given:
                hidden, given = layer(hidden, given)
            else:
                hidden = layer(hidden, given=given if number != 1 else None)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(hidden)))
"""


def write_given(directory: Path, *, returns_given: str = "") -> PreTrainedModel:
    """Save the model, and return it in training mode.

    Args:
        directory: Where to save it.
        returns_given: Which input the layers also return unchanged: ``embedding`` or ``positions``. Otherwise, they
            return only hidden states, and all but the second receive the embedded tokens.
    """
    (directory / "given_model.py").write_text(_CODE)
    CONFIGS["llama"].save_pretrained(directory)
    auto_map = {"AutoConfig": "given_model.GivenConfig", "AutoModelForCausalLM": "given_model.GivenForCausalLM"}
    change(directory / "config.json", model_type="given", returns_given=returns_given, auto_map=auto_map)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=True).float()
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return model.train()
