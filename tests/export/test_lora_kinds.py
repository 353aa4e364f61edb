"""PEFT's variants of LoRA: every reader of adapters refuses what is more than products of A and B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import config as peft_config
from safetensors.torch import load_file, save_file

import compare_llama_cpp
from export_cases import load, logits, write_adapter, write_base
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import analyze, export_gguf, merge
from lightning_pipelite.export.gguf import permute

MODULE = "base_model.model.model.layers.1.self_attn.q_proj"
# The entry of each variant in adapter_config.json.
VARIANTS: dict[str, dict[str, Any]] = {
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "velora_config": {"num_groups": 8, "scale": 1.0, "init_type": "random"},
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]},
    "arrow_config": {"top_k": 3},
    "use_qalora": True,
    "megatron_config": {"tensor_model_parallel_size": 2},
    "layer_replication": [[0, 2], [1, 3]],
    "of_a_later_release": {"strength": 2},
    "of_a_later_release_too": 0.5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", "llama")


def write(
    directory: Path, options: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """Save a LoRA of rank 4 on one module, with further options and tensors."""
    generator = torch.Generator().manual_seed(0)
    held = {
        f"{MODULE}.lora_A.weight": torch.randn(4, 64, generator=generator),
        f"{MODULE}.lora_B.weight": torch.randn(64, 4, generator=generator),
        **(tensors or {}),
    }
    directory.mkdir()
    save_file(held, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layers.1.self_attn.q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | (options or {})))
    return directory


def readers(base: Path, adapter: Path, output: Path) -> dict[str, Any]:
    return {
        "merge": lambda: merge(str(base), str(adapter), f"{output}-merged"),
        "export-gguf": lambda: export_gguf(str(adapter), str(base), f"{output}.gguf"),
        "analyze": lambda: analyze(str(adapter), None, f"{output}-analysis"),
        "analyze with base": lambda: analyze(str(adapter), str(base), f"{output}-analysis-with-base"),
        "compare_llama_cpp": lambda: compare_llama_cpp.trained_logits(str(base), str(adapter), [5, 6, 7]),
    }


def refused(base: Path, adapter: Path, output: Path, says: str, *, but: tuple[str, ...] = ()) -> None:
    for name, read in readers(base, adapter, output).items():
        if name not in but:
            with pytest.raises(ConfigurationError, match=says):
                read()
    assert not [path for path in output.parent.glob(f"{output.name}*") if path != adapter]


@pytest.mark.parametrize("option", VARIANTS)
def test_variants_are_refused_by_name(base: Path, tmp_path: Path, option: str) -> None:
    refused(
        base, write(tmp_path / "lora", {option: VARIANTS[option]}), tmp_path / "out", f"sets {option} in adapter_co"
    )


def test_rows_of_tokens_that_the_file_lacks(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "lora", {"trainable_token_indices": [1, 2]})
    refused(base, adapter, tmp_path / "out", "lacks the rows of its trainable_token_indices")


def test_every_field_that_peft_calls_a_variant_is_refused(base: Path, tmp_path: Path) -> None:
    """All variants in the installed PEFT, except DoRA, which merge supports, and activated LoRA, tested below."""
    from dataclasses import fields

    variants = [each.name for each in fields(LoraConfig) if each.metadata.get("is_lora_variant")]
    assert len(variants) > 3
    for name in set(variants) - {"use_dora", "alora_invocation_tokens"}:
        adapter = write(tmp_path / name, {name: {"a": 1}})
        with pytest.raises(ConfigurationError, match=f"sets {name}"):
            merge(str(base), str(adapter), str(tmp_path / "merged"))


def test_what_peft_itself_saves_of_one(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "kasa", base, target_modules=["q_proj"], kasa_config=peft_config.KasaConfig())
    refused(base, adapter, tmp_path / "out", "sets kasa_config")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"kasa_config": None}))
    refused(base, adapter, tmp_path / "out", "holds .*lora_diag.* is not A or B")


@pytest.mark.parametrize("start", ["mica", "pissa_niter_4", "olora", "corda", "lora_ga", "of a later release"])
def test_initialisations_that_are_not_known(base: Path, tmp_path: Path, start: str) -> None:
    refused(base, write(tmp_path / "lora", {"init_lora_weights": start}), tmp_path / "out", f"initialised with {start}")


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA", "XLORA", "PROMPT_TUNING", None])
def test_adapters_of_other_types(base: Path, tmp_path: Path, kind: str | None) -> None:
    refused(base, write(tmp_path / "lora", {"peft_type": kind}), tmp_path / "out", f"of type {kind}, not a LoRA")


FILES: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "one of another kind": ({}, {f"{MODULE}.lora_E": torch.ones(4)}, "holds .*lora_E .*not A or B"),
    "a bias that is not said": ({}, {f"{MODULE}.lora_B.bias": torch.ones(64)}, "holds .*lora_B.bias .*not A or B"),
    "a magnitude that is not said": ({}, {f"{MODULE}.lora_magnitude_vector": torch.ones(64)}, "not A or B"),
    "a layer's own weight": (
        {},
        {"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(128, 64)},
        "holds .*up_proj.weight .*not A or B",
    ),
    "A without B": ({}, {f"{MODULE.replace('1', '2')}.lora_A.weight": torch.ones(4, 64)}, "lacks .*2.*lora_B"),
    "another rank inside": ({}, {f"{MODULE}.lora_B.weight": torch.ones(64, 8)}, r"A of shape \[4, 64\] and a B of"),
    "rank of 0": ({"r": 0}, {}, "r is 0, but must be an integer of at least 1"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": -1}}, {}, "rank_pattern of q_proj is -1"),
    "alpha": ({"lora_alpha": "8"}, {}, "lora_alpha is '8', but must be a number"),
    "alpha of a pattern": ({"alpha_pattern": {"q_proj": float("nan")}}, {}, "alpha_pattern of q_proj is nan"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_hold_something_else(base: Path, tmp_path: Path, case: str) -> None:
    options, tensors, says = FILES[case]
    refused(base, write(tmp_path / "lora", options, tensors), tmp_path / "out", says)


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_a_rank_that_is_not_the_configurations(base: Path, tmp_path: Path, rank: int) -> None:
    adapter = write(tmp_path / "lora", {"r": rank})
    # The example leaves it to PEFT, which raises an error of its own.
    refused(
        base, adapter, tmp_path / "out", "rank 4, but adapter_config.json says|does not fit", but=("compare_llama_cpp",)
    )


def test_an_empty_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "lora")
    save_file({}, adapter / "adapter_model.safetensors")
    refused(base, adapter, tmp_path / "out", "holds no A and B")


PLAIN: dict[str, dict[str, Any]] = {
    "defaults": json.loads(json.dumps(LoraConfig(task_type="CAUSAL_LM").to_dict(), default=list)),
    "starts": {"init_lora_weights": "orthogonal", "eva_config": {"rho": 2.0}},
    "dropout": {"lora_dropout": 0.1, "inference_mode": False, "auto_mapping": {"parent_library": "x"}},
    "later, and off": {"of_a_later_release": None, "another": False, "lists": []},
}


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize(("alphas", "scaling"), [({}, 2.0), ({"alpha_pattern": {"q_proj": 2}}, 0.5)])
def test_what_is_plain_is_taken_by_all(
    base: Path, tmp_path: Path, case: str, alphas: dict[str, Any], scaling: float
) -> None:
    options = {key: value for key, value in PLAIN[case].items() if key not in ("r", "lora_alpha", "target_modules")}
    adapter = write(tmp_path / "lora", {**options, "peft_type": "LORA", **alphas})
    read = {name: read() for name, read in readers(base, adapter, tmp_path / "out").items()}
    held = load_file(adapter / "adapter_model.safetensors")
    change = scaling * held[f"{MODULE}.lora_B.weight"] @ held[f"{MODULE}.lora_A.weight"]
    name = "model.layers.1.self_attn.q_proj"
    before, after = (load_file(each / "model.safetensors") for each in (base, tmp_path / "out-merged"))
    assert torch.allclose(after[f"{name}.weight"] - before[f"{name}.weight"], change, atol=1e-5)
    assert np.allclose(gguf_product(tmp_path / "out.gguf"), permute(change, 4).numpy(), atol=1e-5)
    for analysis, key in (("out-analysis", name), ("out-analysis-with-base", f"{name}.weight")):
        figures = json.loads((tmp_path / analysis / "analysis.json").read_text())["figures"]
        assert figures[key]["frobenius"] == pytest.approx(float(change.norm()), rel=1e-5)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        merged = load(tmp_path / "out-merged")(input_ids=ids).logits[0]
    assert torch.allclose(read["compare_llama_cpp"], merged, atol=1e-5)


def gguf_product(path: Path) -> np.ndarray:
    """Return what llama.cpp adds to the weight: B·A times alpha / rank, or times 1 if alpha is 0."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    a, b = (next(each.data for each in reader.tensors if each.name.endswith(f"lora_{letter}")) for letter in "ab")
    return (alpha / a.shape[0] if alpha else 1.0) * b @ a


def test_an_alpha_of_zero_adds_nothing_in_llama_cpp(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any]
    for number, options in enumerate(({"lora_alpha": 0}, {"alpha_pattern": {"q_proj": 0.0}})):
        adapter = write(tmp_path / str(number), options)
        export_gguf(str(adapter), str(base), str(tmp_path / f"{number}.gguf"))
        assert not gguf_product(tmp_path / f"{number}.gguf").any()
        analyze(str(adapter), str(base), str(tmp_path / f"{number}-analysis"))
        merge(str(base), str(adapter), str(tmp_path / f"{number}-merged"))
        assert torch.equal(logits(load(base)), logits(load(tmp_path / f"{number}-merged")))


def test_an_activated_lora_goes_to_llama_cpp_with_its_tokens_and_nowhere_else(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "lora", {"alora_invocation_tokens": [5, 6]})
    refused(
        base,
        adapter,
        tmp_path / "out",
        "an activated LoRA applies only after its invocation tokens",
        but=("export-gguf",),
    )
    export_gguf(str(adapter), str(base), str(tmp_path / "out.gguf"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    field = reader.fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [5, 6]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    plain = write(tmp_path / "plain")
    export_gguf(str(plain), str(base), str(tmp_path / "plain.gguf"))
    assert np.array_equal(gguf_product(tmp_path / "out.gguf"), gguf_product(tmp_path / "plain.gguf"))
    assert "adapter.alora.invocation_tokens" not in gguf.GGUFReader(tmp_path / "plain.gguf").fields


def test_what_analyze_does_not_show_is_named(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "dora", base, target_modules=["q_proj"], use_dora=True)
    assert "not shown: the magnitudes of a DoRA" in analyze(str(adapter), None, str(tmp_path / "one"))
    adapter = write_adapter(tmp_path / "whole", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "not shown: 1 whole weight" in analyze(str(adapter), str(base), str(tmp_path / "two"))
    assert "not shown" not in analyze(str(write(tmp_path / "plain")), None, str(tmp_path / "three"))
