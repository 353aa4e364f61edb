"""The plan that is made when training starts."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optimi import Adam

from header_model import LLAMA_70B, write_headers
from lightning_pipelite.adapters import Adapter, Full, LoRA
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.planning.before_training import (
    Job,
    PlannedTraining,
    compared,
    plan_training,
)
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.planner import MARGIN, Planner
from lightning_pipelite.planning.simulation import Simulation
from plan_jobs import run_again, told_by_auto
from processes import Workers
from tiny_job import write_job

SMALL = {**LLAMA_70B, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
JOB = Job(stages=2, method="uniform", micro_batches=4, sequence_len=2048, devices=Devices.alike(2, 24 * 2**30))
ADAM = partial(Adam, lr=1e-3)
Needs = dict[str, int]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> CausalLMLayers:
    directory = write_headers(tmp_path_factory.mktemp("small") / "model", SMALL, shards=2)
    return CausalLMLayers(directory, adapter=LoRA(4), activation_memory="auto", fuse_head=True)


@pytest.fixture(scope="module")
def needs(layers: CausalLMLayers) -> Needs:
    """Return the memory of a device, in bytes, with which each policy just fits."""
    planner = Planner(Simulation(layers, CausalLMLoss(), ADAM), micro_batches=4, sequence_len=2048)
    stages = {policy: planner.stages([0, 3, 6], policy) for policy in planner.policies}
    return {policy: int(max(s.total for s in each) / (1 - MARGIN)) + 1 for policy, each in stages.items()}


def planned(layers: CausalLMLayers, choose: bool = True, **changes: Any) -> PlannedTraining:
    made = plan_training(layers, CausalLMLoss(), ADAM, replace(JOB, **changes), choose)
    assert isinstance(made, PlannedTraining), made
    return made


def test_the_first_policy_that_fits_is_chosen(layers: CausalLMLayers, needs: Needs) -> None:
    assert layers.activation_memory == "recompute"  # until a policy is chosen
    assert needs["keep"] > needs["recompute"] > needs["offload"]
    for policy in ("keep", "recompute", "offload"):
        plan = planned(layers, devices=Devices.alike(2, needs[policy]))
        assert (plan.activation_memory, plan.refusal) == (policy, "")
    assert planned(layers, devices=Devices.alike(2, needs["offload"] - 2**20)).activation_memory == "offload"
    assert layers.activation_memory == "recompute"  # the caller applies the choice


def test_without_a_limit_the_given_policy_stays(layers: CausalLMLayers) -> None:
    plan = planned(layers, devices=Devices.alike(2, None))
    assert plan.activation_memory == "recompute"
    assert plan.refusal == ""
    assert len(plan.peaks) == 2
    assert len(plan.costs.seconds) == 6


def test_what_does_not_fit_is_refused_with_advice(layers: CausalLMLayers, needs: Needs) -> None:
    plan = planned(layers, choose=False, devices=Devices.alike(2, needs["offload"]))
    assert re.search("with activation_memory recompute.* set model.activation_memory to off", plan.refusal)
    one = planned(layers, stages=1, method="auto", devices=Devices.alike(2, needs["offload"]))
    assert re.search("stage 0 of 1 .* pipeline_stages to 2 and partition_method to layers:", one.refusal)
    tight = planned(layers, devices=Devices.alike(2, int(0.98 * needs["offload"]))).refusal
    assert "its GPU has 1.03 GiB, of which it may take 1.00 GiB (3% is kept free, as a plan may be" in tight
    assert re.search(r"use one of these: data.sequence_len: \d+, in 2 stages with activation_memory offload, or", tight)
    assert "use GPUs with more memory, or a smaller model" in planned(layers, devices=Devices.alike(2, 2**28)).refusal


def test_advice_names_what_there_is_of_lighter_weights(layers: CausalLMLayers) -> None:
    """Formats are left out if the adapter excludes them, if in use already, or if slower and larger than nf4."""
    directory = layers.meta_model.model_dir

    def lighter(adapter: Adapter, **options: Any) -> list[str]:
        return CausalLMLayers(directory, adapter=adapter, **options).lighter_weights

    assert lighter(LoRA(4)) == ["load_in_fp8", "load_in_4bit"]
    assert lighter(LoRA(4), load_in_fp8=True) == lighter(LoRA(4), dtype=torch.float32) == ["load_in_4bit"]
    assert lighter(LoRA(4), load_in_4bit=True) == lighter(Full()) == []


def test_a_plan_that_fails_is_no_obstacle(layers: CausalLMLayers) -> None:
    def broken(parameters: Any) -> torch.optim.Optimizer:
        raise ValueError("broken on purpose")

    made = plan_training(layers, CausalLMLoss(), broken, JOB, choose=True)
    assert made == "ValueError: broken on purpose"


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, fused=True),
        partial(torch.optim.AdamW, capturable=True),
        partial(Adam, lr=1e-3, triton=True),
    ],
    ids=["fused", "capturable", "triton"],
)
def test_optimizers_that_run_on_gpus_only_are_planned(layers: CausalLMLayers, make: Any) -> None:
    made = plan_training(layers, CausalLMLoss(), make, JOB, choose=False)
    assert isinstance(made, PlannedTraining), made
    assert made.peaks == planned(layers, choose=False).peaks


def test_what_cannot_be_cut_by_a_plan_says_why(workers: Workers, tmp_path: Path) -> None:
    (told,) = workers.run(1, told_by_auto, str(write_job(tmp_path / "job")))
    assert told.startswith("partition_method is auto, but the costs of the layers could not be determined (")
    assert "meta" in told
    assert told.endswith("); set it to uniform, parameters or type:REGEX.")


def test_a_module_that_has_its_stage_keeps_it(workers: Workers, tmp_path: Path) -> None:
    first, last = workers.run(2, run_again, str(write_job(tmp_path / "job")))
    assert len(set(first)) == len(set(last)) == 1
    assert first[0][1] == last[0][0]


def test_pissa_is_planned_like_lora(tmp_path: Path) -> None:
    directory, peaks = write_headers(tmp_path / "model", SMALL, shards=2), []
    for start in ("default", "pissa"):
        own = CausalLMLayers(directory, adapter=LoRA(4, init_lora_weights=start), fuse_head=True)
        peaks.append(planned(own, choose=False).peaks)
    assert peaks[0] == peaks[1]


def test_planned_and_measured_are_told_together() -> None:
    assert compared([2**30, 2 * 2**30], [2**30, 3 * 2**30]) == (
        "peak memory: stage 0: 1.00 GiB (planned 1.00 GiB), stage 1: 3.00 GiB (planned 2.00 GiB)"
    )
