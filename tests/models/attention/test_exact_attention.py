"""Models whose fast attention would omit soft caps or sinks compute what transformers' eager attention does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

from lightning_pipelite.adapters import Full
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from tiny_models import CPU, SIZES, micro_batches, run_stages

CONFIGS: dict[str, PretrainedConfig] = {
    "caps": Gemma2Config(**SIZES, sliding_window=4),
    "sinks": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
}


def write(directory: Path, kind: str) -> None:
    """Save a model whose attention scores reach the cap of 50."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(directory)


def stages_logits(layers: CausalLMLayers) -> torch.Tensor:
    stages = [layers.build_stage(start, stop, CPU).eval() for start, stop in itertools.pairwise([0, 1, 4])]
    return run_stages(stages, micro_batches()[0][0], torch.arange(12).expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("drops", [False, True], ids=["as installed", "dropped by sdpa"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_caps_and_sinks_are_those_of_eager_attention(
    tmp_path: Path, kind: str, drops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, kind)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    expected = whole(input_ids=micro_batches()[0][0], use_cache=False).logits
    if drops:  # transformers before 5.23 did so with Gemma 2
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
        monkeypatch.setattr(GptOssPreTrainedModel, "_supports_sdpa", True)

        def without_caps(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
            return sdpa_attention_forward(*args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", without_caps)
        fast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert fast.config._attn_implementation == "sdpa"
        difference = fast(input_ids=micro_batches()[0][0], use_cache=False).logits - expected
        assert difference.abs().max() > 1e-2, "nothing is left out"
        with pytest.raises(ConfigurationError, match="attn_implementation sdpa omits"):
            CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full(), attn_implementation="sdpa")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full())
    torch.testing.assert_close(stages_logits(layers), expected, rtol=1e-5, atol=1e-5)


def test_a_class_that_leaves_nothing_out_keeps_its_fast_attention(tmp_path: Path) -> None:
    from tiny_models import write_model

    write_model(tmp_path, "gemma3")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=Full())
    assert layers.build_stage(0, 2, CPU).causal_lm.config._attn_implementation == "sdpa"
