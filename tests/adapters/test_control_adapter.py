"""Control Adapters on stages equal hooks on the unsplit model that materialise every matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from test_lora import trained
from torch import Tensor, nn

from lightning_pipelite.adapters import ControlAdapter, load_control_adapter
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, Stage
from tiny_models import (
    CONFIGS,
    CUTS,
    POSITIONS,
    build,
    cross_entropy,
    micro_batches,
    reference,
    train_stages,
    write_model,
)

CLASSES = torch.randint(-1, 2, (2, 2, 12), generator=torch.Generator().manual_seed(5))


def move(stages: list[Stage]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(trained(stages).items()):
        parameter.data += (0.3 if name.endswith("S") else 0.02) * torch.randn(parameter.shape, generator=generator)


def hook_control(model: nn.Module, parameters: dict[str, Tensor], classes: list[Tensor]) -> None:
    """Make each decoder layer apply W = Q diag(exp(cS) - 1) Qᵀ class by class; ``classes[0]`` holds the batch's."""

    def after(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            hidden = args[0] if args else kwargs["hidden_states"]
            q, s = (parameters[f"causal_lm.model.layers.{number}.control_{letter}"] for letter in "QS")
            delta, added = output - hidden, torch.zeros_like(output)
            for c in (-1, 1):
                matrix = q @ torch.diag(torch.exp(c * s) - 1) @ q.T
                added = added + (classes[0] == c)[..., None] * (delta @ matrix.T)
            return output + added

        return hook

    for number, layer in enumerate(model.get_submodule("model.layers")):
        layer.register_forward_hook(after(number), with_kwargs=True)


def hooked_gradients(directory: Path, values: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model, batch = reference(directory), [CLASSES[0]]
    parameters = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    hook_control(model, parameters, batch)
    logits = []
    for number, (input_ids, labels) in enumerate(micro_batches()):
        batch[0] = CLASSES[number]
        output = model(input_ids=input_ids, position_ids=POSITIONS, use_cache=False).logits
        logits.append(output.detach())
        cross_entropy(output, labels).backward()
    return logits, {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_logits_and_gradients_are_those_of_the_formula(tmp_path: Path, kind: str, memory: Any) -> None:
    write_model(tmp_path, kind)
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=ControlAdapter(4), activation_memory=memory)
    stages = build(layers, [0, 4])
    move(stages)
    expected_logits, expected = hooked_gradients(tmp_path, trained(stages))
    for cuts in CUTS:
        stages = build(layers, cuts)
        move(stages)
        logits, gradients = train_stages(stages, classes=CLASSES.unbind())
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_initial_values_do_not_depend_on_the_partition(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=ControlAdapter(4), seed=7)
    whole = trained(build(layers, [0, 4]))
    assert len(whole) == 4 * 2
    for cuts in CUTS:
        parts = trained(build(layers, cuts)[::-1])
        assert parts.keys() == whole.keys()
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    for name, parameter in whole.items():
        if name.endswith("Q"):
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(4), rtol=0, atol=1e-6)
        else:
            assert not parameter.any()
    queries = [parameter for name, parameter in whole.items() if name.endswith("Q")]
    assert not torch.equal(queries[0], queries[1])


def test_dropout_is_on_the_delta(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    layers = CausalLMLayers(tmp_path, dtype=torch.float32, adapter=ControlAdapter(4, dropout=0.5))
    (stage,) = build(layers, [0, 4])
    move([stage])
    (input_ids, _), _ = micro_batches()

    def run() -> Tensor:
        return stage((input_ids, POSITIONS, CLASSES[0]))

    assert not torch.equal(run(), run())
    stage.eval()
    assert torch.equal(run(), run())
    (without,) = build(CausalLMLayers(tmp_path, dtype=torch.float32, adapter=ControlAdapter(4)), [0, 4])
    move([without])
    assert torch.equal(run(), without.eval()((input_ids, POSITIONS, CLASSES[0])))


def test_chosen_layers_on_a_4_bit_base(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    adapter = ControlAdapter(4, layers_to_transform="1:2")
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, load_in_4bit=True, adapter=adapter)
    for cuts in CUTS:
        stages = build(layers, cuts)
        move(stages)
        _, gradients = train_stages(stages, classes=CLASSES.unbind())
        assert sorted(gradients) == [f"causal_lm.model.layers.{n}.control_{letter}" for n in (1, 2) for letter in "QS"]
        assert all(gradient.any() for gradient in gradients.values())
    adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), tmp_path / "model")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["layers_to_transform"] == [1, 2]


def test_saved_files(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    adapter = ControlAdapter(4, dropout=0.1, gamma=0.25)
    layers = CausalLMLayers(tmp_path / "model", dtype=torch.float32, adapter=adapter)
    stages = build(layers, [0, 1, 4])
    move(stages)
    adapter.save(tmp_path / "adapter", map(layers.trained_state, stages), tmp_path / "model")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    values = {f"base_model.model.{name.removeprefix('causal_lm.')}": p for name, p in trained(stages).items()}
    assert saved.keys() == values.keys()
    assert "base_model.model.model.layers.3.control_Q" in saved
    torch.testing.assert_close(saved, values, rtol=0, atol=0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"], config["control_gamma"]) == (4, 0.1, 0.25)
    assert config["layers_to_transform"] is None
    with pytest.raises(Exception, match="CONTROL_ADAPTER"):  # not taken for a LoRA
        PeftConfig.from_pretrained(tmp_path / "adapter")
    read = load_control_adapter(tmp_path / "adapter")
    assert list(read) == [0, 1, 2, 3]
    for tensor, letter in zip(read[2], "QS", strict=True):
        torch.testing.assert_close(tensor, saved[f"base_model.model.model.layers.2.control_{letter}"], rtol=0, atol=0)


def test_files_of_qlora_pipe_lite_load(tmp_path: Path) -> None:
    """Its adapter_model.bin and adapter_model.safetensors have these keys, in any order."""
    names = [f"base_model.model.model.layers.{n}.control_{letter}" for n in (10, 2) for letter in "SQ"]
    state = {name: torch.randn(*((8, 3) if name.endswith("Q") else (3,))) for name in names}
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "adapter_model.bin")
    (tmp_path / "new").mkdir()
    save_file(state, tmp_path / "new" / "adapter_model.safetensors")
    for directory in ("bin", "new"):
        read = load_control_adapter(tmp_path / directory)
        assert list(read) == [2, 10]
        torch.testing.assert_close(read[10], (state[names[1]], state[names[0]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"base_model.model.model.layers.0.control_A.weight": torch.ones(2, 2)}, "control_A"),
        ({"base_model.model.model.layers.0.control_Q": torch.ones(4, 2)}, "layer 0"),
        (
            {f"layers.0.control_{letter}": torch.ones(4, 2) for letter in "QS"},
            "layer 0",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, state: dict[str, Tensor], word: str) -> None:
    with pytest.raises(ConfigurationError, match="no adapter_model"):
        load_control_adapter(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=word):
        load_control_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_control_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 65}, "64 wide"),
        ({"rank": 4, "dropout": -0.1}, "dropout"),
        ({"rank": 4, "gamma": 0.0}, "gamma"),
        ({"rank": 4, "gamma": 0.6}, "gamma"),
        ({"rank": 4, "layers_to_transform": "4"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_wrong_options_are_named(tmp_path: Path, options: dict, word: str) -> None:
    write_model(tmp_path, "llama")
    with pytest.raises(ConfigurationError, match=word):
        CausalLMLayers(tmp_path, adapter=ControlAdapter(**options))


def test_a_batch_without_classes_and_a_layer_that_does_not_fit_are_told(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    (stage,) = build(CausalLMLayers(tmp_path, dtype=torch.float32, adapter=ControlAdapter(4)), [0, 4])
    (input_ids, _), _ = micro_batches()
    with pytest.raises(ConfigurationError, match="a Control Adapter needs control_classes in every batch"):
        stage((input_ids, POSITIONS))
    with pytest.raises(ConfigurationError, match="streams"):
        stage((input_ids, POSITIONS, CLASSES[0][:, :5]))
    assert stage.causal_lm.extra_inputs == ()
    stage((input_ids, POSITIONS, CLASSES[0]))
