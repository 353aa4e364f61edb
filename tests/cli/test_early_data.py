"""Errors in the data, reported before the slow imports by the functions that read it for training."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from lightning_pipelite import PackedDataModule
from lightning_pipelite.cli.early_data import check_data
from lightning_pipelite.cli.fit_options import read_options
from lightning_pipelite.data.config import PackingOptions
from lightning_pipelite.errors import ConfigurationError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"question": "Who?", "answer": "It."}\n' * 60 + "{\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    data = {"datasets": [{"dataset_path": "good.jsonl"}], "sequence_len": 64, "eval_datasets": None, "cache_dir": "c"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": {"model_dir": "none", "adapter": "LoRA"}, "data": data}))
    return ["--config", "a.yaml"]


BAD = '[{"dataset_path": "bad.jsonl"}]'


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.datasets", BAD], "bad.jsonl, line 2: not valid JSON"),
        ([f"--data.datasets+={BAD}"], "bad.jsonl, line 2: not valid JSON"),
        ([f"--data.eval_datasets={BAD}"], "bad.jsonl, line 2: not valid JSON"),
        (["--data.datasets", '[{"dataset_path": "none.txt"}]'], "dataset_path none.txt matches no file"),
        (["--data.datasets", "[{dataset_path: a.yaml}]"], "a.yaml is not in a supported format"),
        (["--data.datasets", "[]"], "data.datasets is empty"),
        (["--data.datasets", "[{path: a}]"], "data.datasets.path is not an option"),
        (
            ["--data.datasets", "[{dataset_path: good.jsonl, weight: -1}]"],
            "weight of good.jsonl must be positive and finite, not -1",
        ),
        (
            ["--data.sequence_len=100"],
            r"data\.sequence_len must be a positive multiple of 64 \(the size of a GPU tile\), not 100",
        ),
        (["--data.sequence_len=long"], "data.sequence_len must be an integer, not long"),
        (["--data.chat_template=mine"], "data.chat_template mine is not a file"),
        (["--data.datasets", "[{dataset_path: good.jsonl, messages_field: talk}]"], "no field 'talk'"),
    ],
)
def test_what_is_wrong(config: list[str], words: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_data([*config, *words])


@pytest.mark.parametrize(
    "words",
    [
        [],  # line 61, the invalid one, is not read here
        ["--data.datasets", BAD, "--data.skip_bad_records=true"],
        ["--data.datasets", BAD, "--data.datasets", "[{dataset_path: good.jsonl}]"],
        ["--data.datasets", BAD, "--config", "a.yaml"],
        ["--data.datasets", BAD, "--print_config"],
        ["--data.datasets", BAD, "-ca.yaml"],
        ["--data.datasets", BAD, "--data", "other.yaml"],
        ["--config", "model: {}\n", "--data.datasets", BAD],
    ],
)
def test_what_is_right_or_not_read_here_passes(config: list[str], words: list[str]) -> None:
    check_data([*config, *words])


@pytest.mark.parametrize(
    "second",
    [
        "data.datasets: [{dataset_path: good.jsonl}]\n",
        "data: {datasets: sets.yaml}\n",
        "data: {datasets: [one.yaml]}\n",
    ],
)
def test_what_a_second_file_says_in_other_forms(config: list[str], tmp_path: Path, second: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.yaml").write_text(second)
    for folder in (tmp_path, tmp_path / "in"):
        (folder / "sets.yaml").write_text("[{dataset_path: good.jsonl}]\n")
        (folder / "one.yaml").write_text("dataset_path: good.jsonl\n")
    check_data([*config, "--data.datasets", BAD, "--config", "in/b.yaml"])
    check_data([*config, "--data.datasets", "sets.yaml"])


def test_a_model_that_a_second_file_names_by_a_dotted_key(config: list[str], tmp_path: Path) -> None:
    for name, written in (("none", "{}"), ("base", '{"chat_template": "x"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(written)
    (tmp_path / "b.yaml").write_text("model.model_dir: base\n")
    with pytest.raises(ConfigurationError, match="The tokenizer of none has no chat template"):
        check_data(config)
    check_data([*config, "--config", "b.yaml"])


def test_null_is_refused_as_fit_refuses_it(config: list[str], tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("data: {seed: null, max_sequences: null}\n")
    words = [*config, "--config", "b.yaml"]
    for read in (lambda: check_data(words), lambda: read_options(words, {})):
        with pytest.raises(
            ConfigurationError, match=r"^data\.seed cannot be null: leave it out for the default, 0, or give a value\.$"
        ):
            read()
    words = [*config, "--data.seed", "null"]
    for read in (lambda: check_data(words), lambda: read_options(words, {})):
        with pytest.raises(
            ConfigurationError, match=r"^data\.seed cannot be null: leave it out for the default, 0, or give a value\.$"
        ):
            read()


STRATEGY = "lightning_pipelite.PipeLiteStrategy, init_args: {pipeline_stages: null, speeds: null}"
DECAY = "lightning_pipelite.callbacks.EvalSchedule, init_args: {evals_per_epoch: null}"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("model: {load_in_4bit: null}", "model.load_in_4bit cannot be null: leave it out for the default, false"),
        (
            "model: {adapter: {class_path: LoRA, init_args: {rank: 8, dropout: null}}}",
            "model.adapter.dropout cannot be null",
        ),
        (
            "trainer: {max_steps: null, max_epochs: null}",
            "trainer.max_steps cannot be null: leave it out for the default, -1",
        ),
        (
            f"trainer: {{strategy: {{class_path: {STRATEGY}}}}}",
            "trainer.strategy.pipeline_stages cannot be null: leave it",
        ),
        (
            f"trainer: {{callbacks: [{{class_path: {DECAY}}}]}}",
            "trainer.callbacks.EvalSchedule.evals_per_epoch cannot be nu",
        ),
    ],
)
def test_null_is_refused_by_fit(given: str, says: str, config: list[str], tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(given)
    with pytest.raises(ConfigurationError) as refused:
        read_options([*config, "--config", "b.yaml"], {})
    assert str(refused.value).startswith(says)


def test_null_is_taken_where_it_means_something(config: list[str], tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("trainer: {max_epochs: null, logger: null}\nmodel: {optimizer: null}\n")
    assert read_options([*config, "--config", "b.yaml"], {})["trainer"]["max_epochs"] is None


def test_what_is_missing_is_left_to_fit(config: list[str]) -> None:
    check_data(["--data.eval_fraction", "0.5"])
    check_data(["--trainer.devices", "2"])


def test_conversations_without_a_template(config: list[str], tmp_path: Path) -> None:
    model = tmp_path / "base"
    model.mkdir()
    words = [*config, "--model.model_dir=base"]
    check_data(words)  # without a tokenizer, whether it has a template is unknown
    (model / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ConfigurationError, match="The tokenizer of base has no chat template, which conversations"):
        check_data(words)
    check_data([*words, "--data.chat_template=chatml"])
    check_data([*words, "--data.datasets=[{dataset_path: good.jsonl, text_field: question}]"])
    (model / "chat_template.jinja").write_text("x")
    check_data(words)
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    check_data(words)


@pytest.mark.parametrize(("name", "value"), [("PIPELITE_FIT__DATA__SEED", "1"), ("LOCAL_RANK", "1")])
def test_where_it_is_not_looked(config: list[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    check_data([*config, "--data.datasets", BAD])


def test_the_options_are_those_of_the_data_module() -> None:
    parameters = inspect.signature(PackedDataModule.__init__).parameters
    for each in fields(PackingOptions):
        if each.name not in ("shapes", "eval_datasets"):
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            assert parameters[each.name].default == default
            assert parameters[each.name].annotation == each.type


@pytest.mark.parametrize("command", ["fit", "preview"])
def test_torch_is_not_imported_for_it(config: list[str], tmp_path: Path, command: str) -> None:
    (tmp_path / "none").mkdir()
    words = [command, *config, "--data.datasets", BAD]
    program = (
        f"import sys; sys.argv = ['pipelite', *{words}]\nfrom lightning_pipelite.cli.main import main\n"
        "try: main()\nfinally: print([name for name in ('torch', 'transformers', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stderr
    assert "bad.jsonl, line 2: not valid JSON" in done.stderr
