"""Canaries for the undocumented parts of transformers that are used here. A failure says which one changed."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

PACKAGE = Path(__file__).parents[2] / "lightning_pipelite"
COMPAT = ("models/transformers_compat.py", "data/template.py")  # the data package imports nothing of models
DOCUMENTED = {"transformers", "transformers.utils", "transformers.utils.logging"}
LOADING, MASKS = "transformers.core_model_loading", "transformers.masking_utils"


@pytest.mark.parametrize(
    ("module", "name", "used_for"),
    [
        ("transformers.conversion_mapping", "get_model_conversion_mapping", "export reads weights one by one"),
        (LOADING, "Concatenate", "GGUF splits fused experts"),
        (LOADING, "MergeModulelist", "GGUF splits fused experts"),
        (LOADING, "WeightConverter.convert", "export reads weights one by one"),
        (LOADING, "WeightConverter.reverse_transform", "export writes weights in the layout of the files"),
        (LOADING, "WeightRenaming", "export reads weights one by one"),
        (LOADING, "dot_natural_key", "export sorts weights as transformers does"),
        (LOADING, "rename_source_key", "export reads weights one by one"),
        (LOADING, "revert_weight_conversion", "Full saves by the names of the files"),
        ("transformers.dynamic_module_utils", "get_relative_imports", "a copy of a model has all of its code"),
        ("transformers.initialization", "no_init_weights", "a model without weights is built quickly"),
        (MASKS, "ALL_MASK_ATTENTION_FUNCTIONS", "masks keep packed documents apart"),
        (MASKS, "and_masks", "masks keep packed documents apart"),
        (MASKS, "causal_mask_function", "masks keep packed documents apart"),
        (MASKS, "packed_sequence_mask_function", "masks keep packed documents apart"),
        ("transformers.utils.chat_template_utils", "render_jinja_template", "chats are rendered with their spans"),
        ("transformers", "PreTrainedModel._adjust_missing_and_unexpected_keys", "a stage loads a part of a model"),
        (
            "transformers.modeling_utils",
            "caching_allocator_warmup",
            "loading reserves no GPU memory that is not used",
        ),
        ("transformers", "AutoModelForCausalLM._model_mapping", "the class is found that PEFT will load"),
        ("transformers.modeling_rope_utils", "dynamic_rope_update", "rope.py undoes what it leaves in a module"),
        ("transformers.integrations.moe", "use_experts_implementation", "experts are computed by grouped products"),
    ],
)
def test_the_name_is_there(module: str, name: str, used_for: str) -> None:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"transformers no longer has {module}.{name}, which is needed so that {used_for}"
        found = getattr(found, part)


def test_the_attribute_of_a_configuration_decides_how_a_model_attends() -> None:
    from lightning_pipelite.models.transformers_compat import attention_of, set_attention

    config = small()
    assert attention_of(AutoModelForCausalLM.from_config(config, attn_implementation="eager").config) == "eager"
    model = AutoModelForCausalLM.from_config(config)
    set_attention(model.config, "sdpa")
    assert model.config._attn_implementation == "sdpa", "PretrainedConfig._attn_implementation is not what is set"


def test_loading_asks_the_class_what_it_forgives(tmp_path: Path) -> None:
    from lightning_pipelite.models.transformers_compat import loading_class

    model = AutoModelForCausalLM.from_config(small())
    model.save_pretrained(tmp_path)
    kind, reports = type(model), []

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        del self.lm_head

    own = loading_class(kind, build, lambda self, report: reports.append(set(report.unexpected_keys)))
    own.from_pretrained(str(tmp_path))
    told = "from_pretrained no longer calls a subclass's _adjust_missing_and_unexpected_keys(report)"
    assert reports == [{"lm_head.weight"}], told
    assert own.__name__ == "LlamaForCausalLM"


def test_a_parameter_that_is_marked_is_not_initialised() -> None:
    from lightning_pipelite.models.transformers_compat import mark_initialised

    model = AutoModelForCausalLM.from_config(small())
    marked, other = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    for parameter in (marked, other):
        parameter.data.fill_(7.0)
    mark_initialised(marked)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert marked.eq(7).all(), "transformers now ignores _is_hf_initialized"
    assert not other.eq(7).any()


def test_experts_tell_their_layout() -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=8, num_experts=2, moe_intermediate_size=8, vocab_size=8
    )
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts"):
        assert hasattr(experts, name), f"experts no longer have {name}, which tells models/experts.py their layout"


def test_a_mask_is_built_from_what_is_registered() -> None:
    """The documents come from the registered mask function, as a model may not pass positions on to its masks."""
    from lightning_pipelite.models.attention.document_mask import document_mask

    model = AutoModelForCausalLM.from_config(small(), dtype=torch.float32).eval()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    ids = torch.arange(6)[None]
    with torch.no_grad(), document_mask(positions):
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 3:]
    with torch.no_grad():
        alone = model(input_ids=ids[:, 3:], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone)


def small() -> LlamaConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    return LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def test_what_is_not_documented_is_imported_in_one_file() -> None:
    found = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        if str(path.relative_to(PACKAGE)) in COMPAT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.relative_to(PACKAGE)}: {n}" for n in names if n and n.split(".")[0] == "transformers"
                      and n not in DOCUMENTED]  # fmt: skip
    assert found == [], "move these to transformers_compat.py"


def test_the_hook_has_the_signature_that_it_is_replaced_by() -> None:
    assert list(inspect.signature(PreTrainedModel._adjust_missing_and_unexpected_keys).parameters) == [
        "self",
        "loading_info",
    ]
