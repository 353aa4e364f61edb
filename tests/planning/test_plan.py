"""Plans of whole trainings: the command, its advice, and what it refuses."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimi import Adam

from header_model import LLAMA_70B, write_headers
from lightning_pipelite.cli.plan_command import plan
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.planning.before_training import Job, PlannedTraining, plan_training
from lightning_pipelite.planning.report import Report
from lightning_pipelite.planning.settings import parse_memory
from lightning_pipelite.planning.stage_table import span_of
from lightning_pipelite.planning.stages import StageMemory, step
from lightning_pipelite.planning.watched_stage import WatchedStage
from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.partition import cheapest_bounds, partition
from plan_cases import write_config, write_model_config

GIB = 2**30
SMALL = {**LLAMA_70B, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return write_config(folder / "config.yaml", write_headers(folder / "model", SMALL, shards=2), stages=2)


@pytest.fixture(scope="module")
def small_stages(small: Path) -> list[StageMemory]:
    return plan(str(small), devices=2, memory="24GiB").policies["keep"]


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers(tmp_path_factory.mktemp("large") / "model", LLAMA_70B)


@pytest.fixture(scope="module")
def large(llama_70b: Path) -> Report:
    """Plan QLoRA of a 70B-shaped Llama on 4 x 24 GiB, from safetensors headers alone."""
    config = write_config(llama_70b.parent / "config.yaml", llama_70b, load_in_4bit=True)
    return plan(str(config), devices=4, memory="24GiB")


def test_the_configuration_for_four_gpus_of_24_gib_holds_it(llama_70b: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "qlora_four_gpus.yaml"
    told = str(plan(str(config), model_dir=str(llama_70b), memory="24GiB"))
    assert "4 devices of 24.00 GiB; 16 sequences" in told
    assert "as configured, 4 stages" in told
    assert re.search(r"^ +4 +1 +offload .* fits$", told, re.MULTILINE), told


def test_70b_in_qlora_is_planned_from_headers(large: Report) -> None:
    stages = large.policies["recompute"]
    linear = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672)
    whole = 2 * 128_256 * 8192 + 161 * 8192
    rank = 80 * 16 * (2 * 2 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28_672))
    assert sum(s.parameters for s in stages) == linear + whole
    assert sum(s.trained for s in stages) == rank
    # Half a byte per weight, and four bytes per block of 64; bf16 for the ends and norms, fp32 for the adapters.
    weights = linear / 2 + linear / 64 * 4 + 2 * whole + 4 * rank
    assert sum(s.weights for s in stages) == pytest.approx(weights, rel=1e-3)
    assert sum(s.gradients for s in stages) == pytest.approx(4 * rank, rel=1e-3)
    assert sum(s.optimizer for s in stages) == pytest.approx(8 * rank, rel=1e-3)
    assert stages[0].sent == 2 * 8 * (4096 * 8192 * 2 + 4096 * 8)  # hidden states and positions, both ways
    assert [s.in_flight for s in stages] == [4, 3, 2, 1]


def test_70b_in_qlora_gets_advice(large: Report) -> None:
    text = str(large)
    assert large.recommended is not None
    found, planner = large.recommended, large.planner
    assert found.stages == 4
    assert found.policy != "keep"
    assert found.micro_batches == planner.micro_batches * found.stages // large.settings.stages
    planner = planner.of(found.micro_batches)
    assert planner.fits(planner.stages(found.bounds, found.policy, virtual_stages=found.virtual_stages))
    assert large.largest is not None
    for more, fits in ((0, True), (256, False)):
        length = large.largest + more
        longest = planner.stages(found.bounds, planner.policies[-1], length, found.virtual_stages)
        assert planner.fits(longest) == fits
    waits = 1 - step(large.policies[large.policy], 8).efficiency
    assert waits == pytest.approx(3 / 11, abs=0.04)  # except for what the embedding, head and loss add to the ends
    waits = 1 - step(large.shown, planner.micro_batches).efficiency
    assert f"bubble {waits:.0%}" in text
    assert "pipeline_stages: 4, " in text
    assert "partition_method: layers:" in text
    assert large.fewest is not None
    assert large.fewest[0] <= 4


@pytest.mark.parametrize("adapter", ["LoRA", "Full"])
def test_the_headline_counts_each_weight_once(adapter: str, tmp_path: Path) -> None:
    """However the model is cut: with several stages, a tied embedding is held twice but counted once."""
    base = write_model_config(tmp_path / "model", {**SMALL, "num_hidden_layers": 2, "tie_word_embeddings": True})
    kind: dict[str, Any] = {"class_path": f"lightning_pipelite.adapters.{adapter}", "init_args": {"rank": 16}}
    if adapter == "Full":
        del kind["init_args"]
    told = []
    for stages in (1, 2):
        report = plan(str(write_config(tmp_path / f"{stages}.yaml", base, stages, adapter=kind)), devices=2)
        told.append(str(report).splitlines()[0])
    weights = sum(p.numel() for p in report.planner.layers.meta_model.model.parameters())
    assert told[0] == told[1]
    assert f": {weights / 1e9:.2f} billion parameters " in told[0]
    assert told[0].endswith(f"Full, {weights / 1e6:.1f} million trained") == (adapter == "Full")


def test_virtual_stages_are_planned(small: Path, tmp_path: Path) -> None:
    model_dir = small.parent / "model"
    report = plan(str(write_config(tmp_path / "two.yaml", model_dir, 2, virtual_stages=2)), devices=2, memory="24GiB")
    one = plan(str(small), devices=2, memory="24GiB").policies["keep"]
    two = report.policies["keep"]
    assert [stage.spans for stage in two] == [((0, 2), (4, 5)), ((2, 4), (5, 6))]
    assert sum(s.weights for s in two) == pytest.approx(sum(s.weights for s in one), rel=1e-3)
    assert [stage.in_flight for stage in two] == [5, 3]  # pieces, which are half as large as stages
    assert step(two, 8).efficiency > step(one, 8).efficiency
    assert "2 stages of 2 pieces each" in str(report)
    assert span_of(report.planner, two[0]) == "0-1+4-4"
    with pytest.raises(ConfigurationError, match="virtual_stages=2 needs pipeline_stages of 2 or more"):
        plan(str(write_config(tmp_path / "one.yaml", model_dir, 1, virtual_stages=2)), devices=2, memory="24GiB")


def test_virtual_stages_are_recommended_where_they_gain(large: Report) -> None:
    found, few = large.recommended, large.planner
    assert found is not None
    assert found.virtual_stages > 1
    assert few.fits(few.stages(found.bounds, found.policy, virtual_stages=found.virtual_stages))
    alone = few.stages(few.split(4, "auto", found.policy), found.policy)
    assert step(few.stages(found.bounds, found.policy, None, found.virtual_stages), 8).seconds < step(alone, 8).seconds


def test_the_policies_take_less_and_less(large: Report, small: Path, tmp_path: Path) -> None:
    """In compiled layers, the compiler chooses what to keep, with keep as with selective."""

    def fullest(report: Report) -> list[int]:
        assert list(report.policies) == ["keep", "selective", "recompute", "offload"]
        return [max(s.total for s in stages) for stages in report.policies.values()]

    keep, selective, recompute, offload = fullest(large)
    assert keep == selective > recompute > offload
    uncompiled = write_config(tmp_path / "config.yaml", small.parent / "model", 2, compile_layers=False)
    keep, selective, recompute, offload = fullest(plan(str(uncompiled), devices=2, memory="24GiB"))
    assert keep > selective > recompute > offload


def test_rows_as_configured_are_cut_as_fit_cuts(large: Report) -> None:
    """With auto, which heeds memory, each policy has its own cut."""
    planner, settings = large.planner, replace(large.settings, partition_method="auto")
    report = Report.of(planner, settings)
    job = Job(4, "auto", planner.micro_batches, planner.sequence_len, planner.devices)
    made = plan_training(planner.layers, CausalLMLoss(), partial(Adam, lr=1e-3), job, choose=True)
    assert isinstance(made, PlannedTraining)
    assert made.refusal == ""
    assert made.activation_memory != planner.policies[0]
    assert [stage.peak for stage in report.policies[made.activation_memory]] == made.peaks
    assert re.search(f"as configured.*\n( .*\n)* +4 +1 +{made.activation_memory} .* fits\n", str(report))


def test_what_fits_no_device_is_said(small: Path) -> None:
    assert "Nothing fits 2 x" in str(plan(str(small), devices=2, memory="700MiB"))


def test_without_a_memory_only_needs_are_told(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Give --memory" in str(plan(str(small), devices=2))


def test_the_picture_is_a_png(small: Path, tmp_path: Path) -> None:
    plan(str(small), devices=2, memory="24GiB", picture=str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "memory is 'much'; give a size such as 24GiB or 80GB."),
        ({"memory": "0GiB"}, "memory is '0GiB'"),
        ({"devices": 0}, "devices is 0; give a number of at least 1."),
        ({"hosts": -1}, "hosts is -1"),
        ({"sequence_len": 0}, "sequence_len is 0"),
        ({"devices": 3}, "pipeline_stages=2 must divide the number of devices (3)"),
        ({"picture": "plan.jpg"}, "give the name of a .png file."),
        ({"model_dir": "/nowhere"}, "/nowhere is not a directory"),
    ],
)
def test_wrong_options_are_one_sentence(small: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan(str(small), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot be read"),
        ("- 1", "contains no options"),
        ("model: 3", "model is 3; it must hold the options of model."),
        ("model: {model_dir: x}\ndata: {sequence_len: 64}", "model.adapter must be given"),
        ("model: {model_dir: x, adapter: LoRA}", "data.sequence_len must be an integer of at least 1, not None."),
        (
            "model: {model_dir: x, adapter: {class_path: lightning_pipelite.adapters.Lora}}\ndata: {sequence_len: 64}",
            "model.adapter: class_path lightning_pipelite.adapters.Lora cannot be imported",
        ),
        (
            "model: {model_dir: x, adapter: {class_path: LoRA, init_args: {rang: 1}}}\ndata: {sequence_len: 64}",
            "model.adapter.rang is not an option",
        ),
        (
            "model: {model_dir: x, adapter: {class_path: LoRA}}\ndata: {sequence_len: 64}",
            "model.adapter.rank must be given",
        ),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        plan(str(path), memory="24GiB")
    assert message in str(caught.value)


def test_a_model_that_cannot_be_tried_is_one_sentence(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for meta\nmore")

    monkeypatch.setattr(WatchedStage, "train", fail)
    with pytest.raises(ConfigurationError, match=r"model cannot be planned: .* \(RuntimeError: no kernel for meta\);"):
        plan(str(small), memory="24GiB")


def test_memory_is_read_in_both_units() -> None:
    assert parse_memory("24GiB") == 24 * GIB
    assert parse_memory("80 GB") == 80 * 10**9
    assert parse_memory("1.5gib") == GIB * 3 // 2


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(5, 60),
    st.integers(1, 5),
)
def test_no_cut_that_fits_has_a_faster_slowest_stage(
    rows: list[tuple[int, int, int]], stages: int, memory: int, micro_batches: int
) -> None:
    stages = min(stages, len(rows))
    seconds, held, retained = (list(column) for column in zip(*rows, strict=True))

    def cost(bounds: tuple[int, ...]) -> tuple[int, int]:
        pairs = list(itertools.pairwise(bounds))
        fullest = max(
            sum(held[a:b]) + min(micro_batches, stages - i) * sum(retained[a:b]) for i, (a, b) in enumerate(pairs)
        )
        return max(sum(seconds[a:b]) for a, b in pairs), fullest

    cuts = [(0, *cut, len(rows)) for cut in itertools.combinations(range(1, len(rows)), stages - 1)]
    fitting = [cost(cut)[0] for cut in cuts if cost(cut)[1] <= memory]
    found = cost(tuple(cheapest_bounds(LayerCosts(seconds, held, retained, micro_batches, memory), stages)))
    if fitting:
        assert found[1] <= memory
        assert found[0] == min(fitting)
    else:
        assert found[1] == min(cost(cut)[1] for cut in cuts)


def test_auto_needs_layers_that_say_what_they_cost() -> None:
    class Layers:
        names = ("A", "B")

        def parameter_counts(self) -> list[int]:
            return [1, 1]

        def build_stage(self, start: int, stop: int, device: torch.device) -> Any: ...

    with pytest.raises(ConfigurationError, match="the layers do not report their costs"):
        partition(Layers(), 2, "auto")
