"""What users of Lightning rely on works as it does under Lightning's own strategy for one device."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation_jobs import (
    fit_and_test,
    fit_and_validate,
    fit_and_validate_lora,
    fit_and_validate_plainly,
    parameters_seen,
    validate_set,
)
from exact_training import Case, Scale, make_model
from lightning_jobs import fit, fits, late_layers, log_everything, not_a_number, refusal, split_again, terminated
from processes import Workers
from random_jobs import compare_names, dropout_masks
from stage_models import linears, token_loss, tokens


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("skip_odd_steps", [False, True])
def test_hooks_come_in_lightnings_order_with_its_gradients(
    workers: Workers, accumulate: int, skip_odd_steps: bool
) -> None:
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    job = {"options": options, "skip_odd_steps": skip_odd_steps}
    plain = fit(stages=None, **job)
    (one,) = workers.run(1, fits, [job], 1)[0]
    assert one["hooks"] == plain["hooks"]
    assert [hook for hook, _ in one["gradients"]] == [hook for hook, _ in plain["gradients"]]
    expected = [square for _, square in plain["gradients"]]
    assert [square for _, square in one["gradients"]] == pytest.approx(expected, abs=1e-6)
    two = [rank[0] for rank in workers.run(2, fits, [job], 2)]
    assert two[1]["hooks"] == two[0]["hooks"] == plain["hooks"]
    summed = [a + b for (_, a), (_, b) in zip(two[0]["gradients"], two[1]["gradients"], strict=True)]
    assert summed == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(two[0]["weights"], plain["weights"], atol=1e-6, rtol=1e-5)


def test_several_validation_dataloaders_are_evaluated_apart(workers: Workers) -> None:
    job = {"options": {"max_epochs": 2, "val_check_interval": 3, "accumulate_grad_batches": 2}, "loaders": 3}
    plain = fit(stages=None, **job)
    for (ours,) in workers.run(2, fits, [job], 2):
        assert ours["events"] == plain["events"]
        for mine, theirs in zip(ours["metrics"], plain["metrics"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)
    assert len(set(plain["metrics"][-1].values())) == 3


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def logged(folder: Path, kind: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows(folder / kind / "csv" / "metrics.csv"):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def test_loggers_monitor_and_bars(workers: Workers, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = workers.run(2, log_everything, str(tmp_path / "ours"), 2)
    workers.run(1, log_everything, str(tmp_path / "plain"), None)
    for kind in ("TQDMProgressBar", "RichProgressBar"):
        assert {"train/loss", "eval/loss"} <= set(shown[0][kind])
        ours, plain = logged(tmp_path / "ours", kind), logged(tmp_path / "plain", kind)
        assert ours["lr-Adam"] == plain["lr-Adam"]
        assert [step for step, _ in ours["train/loss"]] == [step for step, _ in plain["train/loss"]]
        assert [step for step, _ in ours["train/grad_norm"]] == [step for step, _ in plain["train/loss"]]
        assert ours["eval/loss"][0][0] == plain["eval/loss"][0][0]
        assert ours["eval/loss"][0][1] == pytest.approx(plain["eval/loss"][0][1], abs=1e-6)
        board = EventAccumulator(str(tmp_path / "ours" / kind / "tb"))
        board.Reload()
        assert [event.step for event in board.Scalars("train/loss")] == [step for step, _ in ours["train/loss"]]


@pytest.mark.parametrize(
    ("kind", "stages", "replicas"),
    [("shuffled", 2, 1), ("augmented", 2, 1), ("unseeded", 3, 1), ("injected", 2, 2)],
)
def test_all_stages_see_the_same_rows(workers: Workers, kind: str, stages: int, replicas: int) -> None:
    results = workers.run(stages * replicas, compare_names, kind, stages, replicas)
    last = [result["pairs"] for result in results if result["pairs"]]
    assert len(last) == replicas
    assert all(inputs == targets for pairs in last for inputs, targets in pairs)
    first_epochs = [inputs for pairs in last for inputs, _ in pairs[: len(pairs) // 2]]
    second_epochs = [inputs for pairs in last for inputs, _ in pairs[len(pairs) // 2 :]]
    assert first_epochs != second_epochs
    if kind == "injected":
        assert results[0]["sampler"] == "DistributedSampler"
    if kind in ("shuffled", "injected"):
        assert sorted(first_epochs) == sorted(second_epochs) == list(range(24))


def test_stages_with_different_rows_are_refused(workers: Workers) -> None:
    for result in workers.run(2, compare_names, "different", 2, 1):
        assert "different micro-batches" in result["error"]


def test_dropout_masks_differ_between_stages_replicas_and_micro_batches(workers: Workers) -> None:
    per_rank = workers.run(4, dropout_masks, 2, 2)
    drawn = [tuple(mask) for masks in per_rank for mask in masks if 0.0 in mask]
    assert len(drawn) == 4 * 2
    assert len(set(drawn)) == len(drawn)
    assert all(masks[-1] == [1.0] * 64 for masks in per_rank)  # evaluation applies no dropout


@pytest.mark.parametrize("stages", [1, 2])
def test_an_infinite_loss_stops_before_the_weights_change(workers: Workers, stages: int) -> None:
    for result in workers.run(stages, not_a_number, stages):
        assert result["error"].startswith("step 3: the loss is ")
        assert result["untouched"]
        assert result["step"] == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("stray parameter", "ConfigurationError: the optimizer was given temperature"),
        ("unused parameter", "RuntimeError: stage 0: no gradient reached 0.extra"),
        ("sync_batchnorm", "ConfigurationError: Trainer(sync_batchnorm=True)"),
        ("precision", "ConfigurationError: Trainer(precision='bf16-mixed')"),
        ("lbfgs", "ConfigurationError: LBFGS"),
        ("no optimizer", "ConfigurationError: Module.configure_optimizers() returned None"),
        ("frozen", "ConfigurationError: no parameter of any stage requires a gradient"),
        ("all masked", "RuntimeError: step 1: every target is masked"),
        ("batch", "ConfigurationError: PipeLiteStrategy needs micro-batches that are pairs"),
        ("two loaders", "ConfigurationError: 2 data loaders are iterated in parallel; "),
        ("two loaders in an evaluation", "ConfigurationError: 2 data loaders are iterated in parallel; "),
        ("two loaders, made a pair", "trained"),
        ("predict", "ConfigurationError: PipeLiteStrategy does not support Trainer.predict; to predict, save the"),
    ],
)
def test_what_cannot_be_trained_is_refused(workers: Workers, kind: str, expected: str) -> None:
    assert workers.run(1, refusal, kind)[0].startswith(expected)


def test_layers_may_be_made_in_setup_and_thawed_later(workers: Workers) -> None:
    assert workers.run(2, late_layers, 2)[0] > 0


@pytest.mark.parametrize("stages", [1, 2])
def test_fits_and_validations_of_one_module_follow_each_other(workers: Workers, stages: int) -> None:
    expected = fit_and_validate_plainly()
    assert expected[1] != pytest.approx(expected[0], abs=1e-3)
    for ours in workers.run(stages, fit_and_validate, stages):
        assert ours == pytest.approx(expected, abs=1e-6)


def test_a_trained_adapter_is_what_is_evaluated_after_the_fit(workers: Workers, tmp_path: Path) -> None:
    make_model(tmp_path, Case("tied", tied=True), Scale())
    for stages in (1, 2):
        for before, in_fit, after in workers.run(stages, fit_and_validate_lora, str(tmp_path), stages):
            assert after == pytest.approx(in_fit, abs=1e-6)
            assert abs(after - before) > 0.01


def test_a_callback_that_asks_for_parameters_before_there_are_any_is_told(workers: Workers, tmp_path: Path) -> None:
    make_model(tmp_path, Case("plain"), Scale())
    for named in (True, False):
        told = workers.run(1, parameters_seen, str(tmp_path), "setup", named)[0]
        assert told.startswith("PipeLiteModule has no parameters yet")
        assert "on_fit_start" in told
        later = [
            workers.run(1, parameters_seen, str(tmp_path), hook, named)[0] for hook in ("on_fit_start", "teardown")
        ]
        assert later[0] == later[1] > 0


@pytest.mark.parametrize("loaders", [1, 2])
def test_test_is_lightnings(workers: Workers, loaders: int) -> None:
    metrics, hooks = fit_and_test(None, loaders)
    for stages in (1, 2):
        for ours, our_hooks in workers.run(stages, fit_and_test, stages, loaders):
            assert our_hooks == hooks
            for mine, theirs in zip(ours, metrics, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-6)


def test_a_module_is_not_split_in_two_ways(workers: Workers) -> None:
    assert "was already split into different stages" in workers.run(1, split_again)[0]


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_evaluation_is_the_mean_over_the_whole_set(workers: Workers, stages: int, replicas: int) -> None:
    for kind, number in (("dealt", 11), ("plain", 12)):
        torch.manual_seed(4)
        batches = tokens(number)
        net = nn.Sequential(*linears(4))
        with torch.no_grad():
            terms = [token_loss(net(inputs), targets) for inputs, targets in batches]
        expected = sum(float(total) for total, _ in terms) / sum(int(count) for _, count in terms)
        for loss, _ in workers.run(stages * replicas, validate_set, kind, number, stages, replicas):
            assert loss == pytest.approx(expected, abs=1e-6), kind


def test_samples_that_lightning_repeats_are_told(workers: Workers) -> None:
    _, messages = workers.run(2, validate_set, "plain", 11, 1, 2)[0]
    assert any("eval/loss counts 1 of 11 samples twice" in message for message in messages)


@pytest.mark.parametrize(("asks", "signal"), [(0, "SIGTERM"), (1, "SIGTERM"), (1, "SIGINT")])
def test_after_a_signal_to_one_rank_all_end_the_step_and_leave(workers: Workers, asks: int, signal: str) -> None:
    assert workers.run(2, terminated, asks, signal) == [(3, "SIGTERMException")] * 2
