"""Devices of different memory and speed: what each stage gets, and when a device is better left out."""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import yaml
from optimi import Adam

from header_model import LLAMA_70B, write_headers
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.cli.plan_command import plan
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.planning.before_training import Job, PlannedTraining, plan_training
from lightning_pipelite.planning.device_speed import relative
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.leaving_out import faster_without
from lightning_pipelite.planning.planner import MARGIN, Planner
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.stages import step
from lightning_pipelite.strategy import PipeLiteStrategy
from plan_cases import write_config
from plan_jobs import cut_by_speeds
from processes import Workers
from tiny_job import write_job

GIB = 2**30
WIDE = {**LLAMA_70B, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
        "vocab_size": 8192}  # fmt: skip
ADAM = partial(Adam, lr=1e-3)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers(tmp_path_factory.mktemp("wide") / "model", WIDE)


@pytest.fixture(scope="module")
def simulation(model_dir: Path) -> Simulation:
    layers = CausalLMLayers(model_dir, adapter=LoRA(4), activation_memory="keep", fuse_head=True)
    return Simulation(layers, CausalLMLoss(), ADAM)


def planner(simulation: Simulation, devices: Devices) -> Planner:
    return Planner(simulation, micro_batches=8, sequence_len=2048, devices=devices)


@pytest.mark.parametrize(
    ("column_major", "memory", "speeds"), [(False, (1, 3), (0.5, 0.125)), (True, (3, 1), (0.5, 0.125))]
)
def test_a_stage_is_as_its_least_device(
    column_major: bool, memory: tuple[int, int], speeds: tuple[float, float]
) -> None:
    devices = Devices(4, (3, 1, 4, 3) if not column_major else (3, 4, 3, 1), (4, 2, 2, 0.5), column_major)
    assert (devices.memory_of_stages(2), devices.speed_of_stages(2)) == (memory, speeds)
    assert devices.speed_of_stages(4) == (1, 0.5, 0.5, 0.125)


def test_devices_that_are_alike_are_so_in_any_number_of_stages() -> None:
    assert Devices.alike(4, 5).memory_of_stages(3) == (5, 5, 5)
    assert Devices.alike(4).memory_of_stages(3) == Devices.alike(4).speed_of_stages(3) == ()


def test_speeds_of_one_kind_of_device_count_as_alike() -> None:
    assert relative([700e12, 690e12, 672e12]) == ()
    assert relative([700e12, 350e12]) == (1, 0.5)


def test_a_slow_device_gets_fewer_layers_and_none_of_all_cuts_is_much_faster(simulation: Simulation) -> None:
    even, slow = (planner(simulation, Devices(2, (), speeds)) for speeds in ((), (1.0, 0.5)))
    cut = slow.split(2, "auto", "keep")
    assert cut[1] > even.split(2, "auto", "keep")[1]

    def seconds(bounds: list[int]) -> float:
        return step(slow.stages(bounds, "keep"), 8).seconds

    best = min(seconds([0, inner, 16]) for inner in range(1, 16))
    assert seconds(cut) <= best / 0.93
    first, second = slow.stages(cut, "keep")
    assert second.seconds == pytest.approx(2 * even.stages(cut, "keep")[1].seconds)
    assert first.seconds == pytest.approx(even.stages(cut, "keep")[0].seconds)


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_a_small_device_gets_what_fits_it(simulation: Simulation, virtual_stages: int) -> None:
    unlimited = planner(simulation, Devices(2))
    even = unlimited.split(2, "auto", "keep", virtual_stages)
    first, second = (stage.total for stage in unlimited.stages(even, "keep", virtual_stages=virtual_stages))
    for memory in ((int(0.9 * first), 2 * second), (2 * first, int(0.9 * second))):
        on = planner(simulation, Devices(2, memory))
        stages = on.stages(on.split(2, "auto", "keep", virtual_stages), "keep", virtual_stages=virtual_stages)
        assert on.fits(stages)
        assert not on.fits(on.stages(even, "keep", virtual_stages=virtual_stages))
        for stage, size in zip(stages, memory, strict=True):
            assert stage.total <= (1 - MARGIN) * size


def test_the_longest_sequence_goes_by_each_stages_own_device(simulation: Simulation) -> None:
    unlimited = planner(simulation, Devices(2))
    first, second = (stage.total for stage in unlimited.stages([0, 8, 16], "keep"))
    on = planner(simulation, Devices(2, (2 * first, int(1.2 * second))))
    longest = on.largest_sequence([0, 8, 16], "keep")
    for length, fits in ((longest, True), (longest + 256, False)):
        assert on.fits(on.stages([0, 8, 16], "keep", length)) == fits


@pytest.mark.parametrize(("speed", "left_out"), [(1.0, False), (0.7, False), (0.01, True)])
def test_a_device_that_only_holds_the_others_up_is_named(simulation: Simulation, speed: float, left_out: bool) -> None:
    on = planner(simulation, Devices(3, (), (1.0, speed, 1.0)))
    told = faster_without(on, 3, "keep", 1)
    assert bool(told) == left_out
    if left_out:
        assert told.startswith("the devices of stage 1 are so slow (0.01 of the fastest)")
        assert told.endswith("leave them out, and set pipeline_stages to 2.")


def test_a_training_is_cut_and_refused_by_each_ranks_own_device(simulation: Simulation) -> None:
    def made(devices: Devices, method: str) -> PlannedTraining:
        job = Job(2, method, 8, 2048, devices)
        plan = plan_training(simulation.layers, CausalLMLoss(), ADAM, job, choose=False)
        assert isinstance(plan, PlannedTraining), plan
        return plan

    first, second = planner(simulation, Devices(2)).stages([0, 8, 16], "keep")
    memory = (2 * first.total, int(0.8 * second.total))
    refused = made(Devices(2, memory), "uniform").refusal
    assert refused.startswith("stage 1 of 2 would take")
    assert f"but its GPU has {memory[1] / GIB:.2f} GiB" in refused
    fitting = made(Devices(2, memory, (1.0, 0.9)), "auto")
    assert fitting.refusal == ""
    assert fitting.costs.memory is not None
    assert len(list(fitting.costs.memory)) == 2  # type: ignore[arg-type]
    assert fitting.costs.speeds == (1.0, 0.9)
    assert made(Devices(2, (), (1.0, 0.01)), "auto").advice.startswith("the devices of stage 1 are so slow")


def test_the_command_takes_a_memory_and_a_speed_for_each(model_dir: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "config.yaml", model_dir, stages=2))
    report = plan(config, devices=2, memory="24GiB,2GiB", speeds="1,0.5")
    assert report.planner.devices == Devices(2, (24 * GIB, 2 * GIB), (1.0, 0.5))
    assert "2 devices of 24.00 GiB, 2.00 GiB, with relative speeds 1, 0.5" in str(report)
    assert report.recommended is not None
    assert "partition_method: auto" in str(report)  # layers: would be refused together with speeds
    sizes = [stop - start for start, stop in itertools.pairwise(report.recommended.bounds)]
    assert sum(sizes[0::2]) > sum(sizes[1::2])
    for wrong, message in (
        ({"memory": "24GiB,16GiB,8GiB"}, "memory has 3 values for 2 devices"),
        ({"speeds": "1,1,1"}, "speeds has 3 values for 2 devices"),
        ({"speeds": "1,fast"}, "speeds is '1,fast'; give a positive number"),
        ({"speeds": "1,-1"}, "speeds is '1,-1'; give a positive number"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            plan(config, devices=2, **wrong)  # type: ignore[arg-type]


def test_a_training_gives_the_device_that_is_said_to_be_slow_fewer_layers(workers: Workers, tmp_path: Path) -> None:
    job = str(write_job(tmp_path / "job"))
    alike, slow_last, slow_first = (
        workers.run(2, cut_by_speeds, job, speeds)[0][1] for speeds in ([1.0, 1.0], [1.0, 0.2], [0.2, 1.0])
    )
    assert slow_first < alike < slow_last


def test_speeds_that_nothing_uses_or_that_are_none_are_refused() -> None:
    for speeds, method, message in (
        ([1.0, 0.5], "uniform", "speeds are given, but partition_method is uniform; set it to auto"),
        ([1.0, 0.0], "auto", "speeds is [1.0, 0.0]; give a positive number for each device, as in 1,1,0.5."),
        ([], "auto", "speeds is []; give a positive number for each device, as in 1,1,0.5."),
        (["1", 1.0], "auto", "speeds is ['1', 1.0]; give a positive number for each device, as in 1,1,0.5."),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            PipeLiteStrategy(2, partition_method=method, speeds=speeds)  # type: ignore[arg-type]
    strategy = PipeLiteStrategy(2, partition_method="auto", speeds=[1.0])
    with pytest.raises(ConfigurationError, match="the number of speeds is 1, but the job has 2 devices"):
        L.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False).fit(L.LightningModule())


@pytest.mark.parametrize("speeds", [[1.0, -0.5], [0.0, 1.0], []])
def test_speeds_of_a_configuration_are_checked_by_a_plan_too(
    tmp_path: Path, model_dir: Path, speeds: list[float]
) -> None:
    config = write_config(tmp_path / "config.yaml", model_dir, stages=2)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["strategy"]["init_args"] |= {"speeds": speeds, "partition_method": "auto"}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError, match="give a positive number for each device"):
        plan(str(config), devices=2, memory="24GiB")
