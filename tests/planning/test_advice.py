"""What a plan recommends, the command that trains that way, and what would fit where nothing does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from header_model import LLAMA_70B
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.cli.configuration import Configuration
from lightning_pipelite.cli.plan_command import plan
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import layers
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.quantization import fp8
from lightning_pipelite.planning.fit_command import fit_command
from lightning_pipelite.planning.gpus import GPUS, gpu_named
from lightning_pipelite.planning.planner import MARGIN
from lightning_pipelite.planning.report import Report
from lightning_pipelite.planning.settings import gib, parse_memory, settings_of
from lightning_pipelite.planning.ways import attention_targets
from plan_cases import write_config, write_model_config

SMALL = {
    **LLAMA_70B, "hidden_size": 1024, "intermediate_size": 16_384, "num_hidden_layers": 8, "num_attention_heads": 8,
    "vocab_size": 4096,
}  # fmt: skip
SHORT = ("--data.sequence_len", "512")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    return write_config(folder / "a config.yaml", write_model_config(folder / "model", SMALL), stages=1)


def planned(config: Path, *words: str, devices: int, memory: str, **options: object) -> Report:
    return plan(Configuration(("--config", str(config), *words)), devices, memory, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two(config: Path) -> Report:
    """Plan a model that fits two devices in two stages, but not in one."""
    return planned(config, *SHORT, devices=2, memory="1.3GiB")


def test_the_command_trains_as_recommended(two: Report) -> None:
    found = two.recommended
    assert found is not None
    assert found.stages == 2
    command = str(two).partition("pipelite fit ")[2].partition("\n\n")[0]
    words = shlex.split(command.replace("\\\n", " "))
    content = Configuration(tuple(words)).read()
    settings = settings_of(content, "")
    assert (settings.stages, settings.virtual_stages, settings.devices) == (2, found.virtual_stages, 2)
    assert settings.partition_method == found.options["partition_method"]
    assert content["model"]["activation_memory"] == found.policy
    assert settings.sequence_len == 512
    again = plan(Configuration(tuple(words)), memory="1.3GiB")
    assert again.sequences == two.sequences
    policies = again.policies[found.policy]
    assert again.planner.fits(policies)
    assert [stage.total for stage in policies] == [stage.total for stage in two.shown]


def test_sequences_a_step_are_equal(two: Report) -> None:
    """Two replicas of one stage take 8 micro-batches each; two stages then take 16."""
    assert two.sequences == 16
    assert two.recommended is not None
    assert two.recommended.micro_batches == 16
    assert "--trainer.accumulate_grad_batches 16" in str(two)
    assert two.planner.stage_counts(16) == [1, 2]
    assert two.planner.stage_counts(15) == [2]


def test_the_recommended_case_comes_first_and_the_limit_is_told(two: Report) -> None:
    text = str(two)
    order = ["A stage may take 1.26 GiB: 3% is kept free", "Recommended:", "tokens/s", "\nstage ", "pipelite fit"]
    order += ["as configured, 1 stage, partition_method uniform:", "does not fit", "offload takes up to"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert not re.search(r"\b0\.0 MiB|1 stages|1 devices|1 replicas", text)


def test_the_table_fits_a_narrow_terminal(two: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def table(columns: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", columns)
        lines = str(two).splitlines()
        (start,) = (number for number, line in enumerate(lines) if line.startswith("stage"))
        return lines[start : start + 8]

    assert {"params", "loss"} < set(table("120")[0].split())
    narrow = table("80")
    assert max(map(len, narrow)) <= 80
    assert narrow[0].split()[:4] == ["stage", "layers", "weights", "grads"]
    for each, wide in zip(narrow[1:3], table("120")[1:3], strict=True):
        cells = wide.split()
        assert each.split() == cells[:2] + cells[3:8] + cells[9:]


def test_given_options_stand_once() -> None:
    words = ("--config", "my file.yaml", "--trainer.devices=4", "--model.lr", "1e-4", "--trainer.devices", "2")
    assert shlex.split(fit_command(words, {"trainer.devices": 3}).replace("\\\n", " ")) == [
        "pipelite", "fit", "--config", "my file.yaml", "--model.lr", "1e-4", "--trainer.devices", "3",
    ]  # fmt: skip


def test_a_configuration_by_its_short_option_stays() -> None:
    words = ("--trainer.devices", "2", "-c", "a.yaml", "--model.lr", "-1", "-c", "b.yaml")
    assert shlex.split(fit_command(words, {"trainer.devices": 3, "model.lr": 1}).replace("\\\n", " ")) == [
        "pipelite", "fit", "-c", "a.yaml", "-c", "b.yaml", "--trainer.devices", "3", "--model.lr", "1",
    ]  # fmt: skip


def test_where_nothing_fits_what_would_is_planned(config: Path) -> None:
    """The suggested ways are planned on their own and fit, nf4 with the memory and stages that were claimed."""
    report = planned(config, *SHORT, devices=2, memory="1GiB")
    assert report.recommended is None
    text = str(report)
    assert "Nothing fits 2 x 1.00 GiB: 2 stages with activation_memory offload would take" in text
    assert "Any one of these would make it fit:" in text
    ways = "\n".join(report.ways)
    claimed = re.search(r"model.load_in_4bit: true: ([\d.]+ .iB) per device, in (\d) stages", ways)
    assert claimed, ways
    tried = planned(config, *SHORT, "--model.load_in_4bit", "true", devices=2, memory="1GiB")
    assert tried.recommended is not None
    assert tried.recommended.stages == int(claimed[2])
    assert gib(max(stage.total for stage in tried.shown)) == claimed[1]
    assert "model.load_in_fp8: true, and 3 devices" in ways
    assert planned(config, *SHORT, "--model.load_in_fp8", "true", devices=3, memory="1GiB").recommended
    assert "\n4 devices, in 4 stages" in ways
    assert planned(config, *SHORT, devices=4, memory="1GiB").recommended
    assert "attention only" not in ways  # it would need as many devices


def test_less_at_once_is_proposed(config: Path) -> None:
    """If the weights fit and the activations do not, a sequence length that fits is suggested."""
    report = planned(config, "--model.activation_memory", "keep", devices=2, memory="1.3GiB")
    ways = "\n".join(report.ways)
    length = re.search(r"data.sequence_len: (\d+), in 2 stages with activation_memory offload", ways)
    assert length, ways
    assert planned(config, devices=2, memory="1.3GiB", sequence_len=int(length[1])).recommended


def test_no_way_is_on_already_or_refused(config: Path) -> None:
    four = planned(config, *SHORT, "--model.load_in_4bit", "true", devices=1, memory="0.9GiB")
    full = planned(config, *SHORT, "--model.adapter", "Full", devices=1, memory="2GiB")
    for report, unfit in ((four, "load_in"), (full, "load_in|target_modules|double_quant")):
        assert report.recommended is None
        assert report.ways
        assert not re.search(unfit, "\n".join(report.ways))


def test_attention_alone(config: Path) -> None:
    def names(**options: object) -> list[str]:
        directory = config.parent / "model"
        adapter = LoRA(4, **options)  # type: ignore[arg-type]
        return attention_targets(CausalLMLayers(directory, adapter=adapter, needs_weights=False))

    assert names() == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert names(target_modules=["q_proj", "up_proj"]) == ["q_proj"]
    assert names(target_modules=["q_proj", "v_proj"]) == names(target_modules=["up_proj"]) == []


def test_offload_says_what_the_host_needs(two: Report) -> None:
    """The host holds each layer's bfloat16 input of 512 x 1024 for every micro-batch in flight, and little else."""
    stages = two.planner.of(16).stages([0, 4, 8], "offload")
    hidden = 512 * 1024 * 2
    assert [stage.on_host for stage in stages] == [pytest.approx(n * 4 * hidden, rel=0.01) for n in (2, 1)]
    assert all(stage.on_host == 0 for stage in two.policies["recompute"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24 * 2**30), ("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("24 GB", 24 * 10**9), ("512MiB", 2**29)],
)
def test_units_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["25769803776", "24B", "24KiB", "0", "0GiB", "1e3", "-24", "24 parsecs"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"memory is '.*; give (a size|that of one GPU,) such as 24GiB or 80GB"
    ):
        parse_memory(text)


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (100, "100 bytes"), (2048, "2.0 KiB"), (30 * 2**10, "30.0 KiB"), (3 * 2**20, "3.0 MiB"),
     (2**29, "0.50 GiB")],
)  # fmt: skip
def test_bytes_in_words(size: int, words: str) -> None:
    assert gib(size) == words


def test_a_gpu_has_its_memory_and_its_speed(config: Path) -> None:
    def step(name: str) -> float:
        report = planned(config, devices=1, memory=None, device=name)  # type: ignore[arg-type]
        assert report.recommended is not None
        assert report.planner.memory == gpu_named(name).memory
        rates = "measured" if name == "h100" else "published"
        assert f"(estimated for {gpu_named(name).name}s from {rates} rates)" in str(report)
        return report.recommended.seconds

    assert step("3090") > step("RTX 4090") > step("h100")


@pytest.mark.parametrize("name", ["rtx-4090", "NVIDIA GeForce RTX 4090", "4090"])
def test_names_of_a_gpu(name: str) -> None:
    assert gpu_named(name) is GPUS["4090"]


def test_a_gpu_that_is_not_known() -> None:
    with pytest.raises(ConfigurationError, match=r"device is '4080'; did you mean 4090\? Choose one of 3090, 4090"):
        gpu_named("4080")


def test_without_fp8_its_codes_are_no_faster() -> None:
    for gpu in GPUS.values():
        assert (gpu.flops(1) > gpu.flops(2)) == (gpu.fp8 is not None)
        assert gpu.flops(2) > gpu.flops(4)


FP8 = ("--model.load_in_fp8", "true")
CACHE = ("--model.fp8_transpose_cache", "true")


@pytest.mark.parametrize("here", [False, True], ids=["on a machine without FP8", "on one with FP8"])
def test_transposed_copies_are_advised_where_they_make_training_faster(
    config: Path, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the GPU of this machine can do, what counts is the one that the plan is for."""
    monkeypatch.setattr(layers, "has_fp8", lambda device: here)
    monkeypatch.setattr(fp8, "has_fp8", lambda device: here)

    def on(memory: str, *options: str, device: str = "4090") -> Report:
        return planned(config, *SHORT, *FP8, *options, devices=1, memory=memory, device=device)

    def most(report: Report) -> int:
        return max(stage.total for stage in report.shown)

    one, two = on("24GiB"), on("24GiB", *CACHE)
    assert one.recommended is not None
    assert two.recommended is not None
    assert two.recommended.seconds < one.recommended.seconds
    advice = r"\n\d+\.\d% faster with a second, transposed copy .* --model.fp8_transpose_cache true\."
    assert re.search(advice, str(one))
    assert "faster with" not in str(two)
    grown = most(two) - most(one)
    codes = sum(p.numel() for layer in two.planner.layers.meta_model.layers for p in layer.parameters() if p.ndim > 1)
    assert abs(grown / codes - 1) < 0.05
    between = f"{round((most(one) + grown / 2) / (1 - MARGIN) / 2**20)}MiB"
    assert "faster with" not in str(on(between))
    slower = on(between, *CACHE)  # only with another activation_memory
    assert slower.recommended is not None
    assert slower.recommended.policy != one.recommended.policy
    assert f"with activation_memory {one.recommended.policy}: --model.fp8_transpose_cache false." in str(slower)
    without, with_cache = on("24GiB", device="3090"), on("24GiB", *CACHE, device="3090")
    assert most(without) == most(with_cache)  # nothing is kept where no product is in FP8
    assert "fp8_transpose_cache" not in "".join([*without._notes(), *with_cache._notes()])


def test_where_nothing_fits_with_transposed_copies_what_would_is_named_in_full(config: Path) -> None:
    report = planned(config, *SHORT, *FP8, *CACHE, devices=1, memory="1.2GiB", device="4090")
    assert report.recommended is None
    assert "model.load_in_4bit: true and model.load_in_fp8: false and model.fp8_transpose_cache: false" in str(report)


def test_the_margin_is_told_where_it_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "will-it-fit.md").read_text()
    assert f"{MARGIN:.0%}".replace("%", " %") in page


def test_another_strategy_is_refused(config: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"trainer.strategy is ddp, which does not train in stages"):
        planned(config, "--trainer.strategy", "ddp", devices=1, memory="24GiB")


def test_the_state_of_the_optimizer_on_the_host(config: Path) -> None:
    """On a device, the plan counts only what a step brings there; it suggests offloading if that makes training fit."""
    options = (*SHORT, "--model.adapter", "Full", "--model.dtype", "float32")
    here = planned(config, *options, devices=1, memory="1GiB")
    (stage,) = here.policies["offload"]
    assert stage.optimizer == pytest.approx(8 * stage.trained, rel=1e-3)  # Adam's moments, float32
    assert stage.optimizer_on_host == 0
    offloaded = planned(config, *options, "--model.offload_optimizer", "true", devices=1, memory="1GiB")
    (away,) = offloaded.policies["offload"]
    assert (away.optimizer, away.optimizer_on_host) == (0, stage.optimizer)
    least = stage.peak - stage.optimizer
    assert least <= away.peak <= max(least, away.weights + away.gradients + away.optimizer_on_host + 2**26)
    assert f"offload_optimizer keeps up to {gib(stage.optimizer)} of a stage's optimizer state" in str(offloaded)
    assert "offload_optimizer" not in "\n".join(offloaded.ways)
    between = f"{(away.total + stage.total) // 2 / 2**30:.3f}GiB"
    ways = "\n".join(planned(config, *options, devices=1, memory=between).ways)
    claimed = re.search(r"model.offload_optimizer: true: ([\d.]+ .iB) per device, in 1 stage", ways)
    assert claimed, ways
    found = planned(config, *options, "--model.offload_optimizer", "true", devices=1, memory=between)
    assert found.recommended is not None
    assert gib(max(stage.total for stage in found.shown)) == claimed[1]
    assert "--model.offload_optimizer true" in str(found)
