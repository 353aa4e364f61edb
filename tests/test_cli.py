"""The ``pipelite`` command as its user sees it: above all, what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_job import options, write_job

from lightning_pipelite import __version__, cli

Config = dict[str, Any]
LORA = "lightning_pipelite.adapters.LoRA"
STRATEGY = "lightning_pipelite.PipeLiteStrategy"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The command sets variables for the processes that it would start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def pipelite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Run the command in this process, in an empty directory; tell what it did."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, *args, **kwargs: started.append(command))

    def run(*arguments: str) -> SimpleNamespace:
        before = {path.name for path in here.iterdir()}
        monkeypatch.setattr(sys, "argv", ["pipelite", *arguments])
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        left = {path.name for path in here.iterdir()} - before
        return SimpleNamespace(code=code, out=out, err=err, started=started, left=left)

    return run


# What is wrong, and what is said


@dataclass
class Case:
    """Something wrong.

    Args:
        says: the sentence; ``{job}`` and ``{here}`` stand for directories.
        arguments: of the command, after ``fit --config config.yaml`` unless ``command`` says otherwise.
        edit: dotted keys and their values in the configuration; None removes the key.
        prepare: what else has to be wrong, given the working directory and the job.
    """

    says: str
    arguments: list[str] = field(default_factory=list)
    edit: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path, Path], None] = lambda here, job: None
    command: list[str] = field(default_factory=lambda: ["fit", "--config", "config.yaml"])
    environment: dict[str, str] = field(default_factory=dict)


def file(name: str, content: str | bytes) -> Callable[[Path, Path], None]:
    """Write a file into the working directory."""

    def write(here: Path, job: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def copied_model(damage: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """Copy the model to ``copy`` in the working directory, and damage it."""

    def copy(here: Path, job: Path) -> None:
        shutil.copytree(job / "model", here / "copy")
        damage(here / "copy")

    return copy


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def strategy(**init_args: Any) -> dict[str, Any]:
    return {"trainer.strategy": {"class_path": STRATEGY, "init_args": init_args}}


def callback(name: str, **init_args: Any) -> dict[str, Any]:
    return {"trainer.callbacks": [{"class_path": f"lightning_pipelite.callbacks.{name}", "init_args": init_args}]}


GIVEN = "must be given, in the configuration file or on the command line."
MODULES = (
    "act_fn, down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, layers, lm_head, mlp, model, norm, o_proj, "
    "post_attention_layernorm, q_proj, rotary_emb, self_attn, up_proj, v_proj"
)
CASES = {
    # The command and its files
    "no subcommand": Case("say what to do: pipelite fit or pipelite validate.", command=[]),
    "unknown subcommand": Case("say what to do: pipelite fit or pipelite validate.", command=["train"]),
    "subcommand after its options": Case(
        "say what to do: pipelite fit or pipelite validate.", command=["--config", "config.yaml"]
    ),
    "argument that is no option": Case("now is not an option; pipelite fit --help lists the options.", ["now"]),
    "option without a value": Case("--trainer.max_steps is given without a value; write one behind it.",
        ["--trainer.max_steps"]),
    "no configuration file there": Case(
        "--config: File does not exist: '{here}/none.yaml'; give a YAML or JSON file.",
        command=["fit", "--config", "none.yaml"],
    ),
    "directory as a configuration file": Case(
        "--config: Path is not a file: '{here}/.'; give a YAML or JSON file.", command=["fit", "--config", "."]
    ),
    "invalid YAML": Case(
        "the configuration file bad.yaml cannot be read (line 2: expected the node content, but found '<stream end>'); "
        "correct it.",
        prepare=file("bad.yaml", "model: [\n"),
        command=["fit", "--config", "bad.yaml"],
    ),
    "text for a configuration": Case(
        "the configuration file bad.yaml holds no options; write them as in model: ...",
        prepare=file("bad.yaml", "train it please"),
        command=["fit", "--config", "bad.yaml"],
    ),
    # Keys and types
    "unknown option": Case("--model.lrr is not an option; did you mean --model.lr?", ["--model.lrr", "1"]),
    "unknown key of the model": Case("model.lrr is not an option; did you mean model.lr?", edit={"model.lrr": 1}),
    "unknown key of the trainer": Case(
        "trainer.max_step is not an option; did you mean trainer.max_steps?", edit={"trainer.max_step": 1}
    ),
    "unknown key of the data": Case(
        "data.sequence_length is not an option; did you mean data.sequence_len?", edit={"data.sequence_length": 64}
    ),
    "unknown key of a dataset": Case(
        "data.datasets.path is not an option; correct its name or remove it.", edit={"data.datasets": [{"path": "."}]}
    ),
    "unknown key of the adapter": Case(
        "model.adapter.alpha is not an option; correct its name or remove it.",
        edit={"model.adapter.init_args.alpha": 4},
    ),
    "unknown key of the strategy": Case(
        "trainer.strategy.stages is not an option; correct its name or remove it.", edit=strategy(stages=2)
    ),
    "unknown key of a callback": Case(
        "trainer.callbacks.evals is not an option; correct its name or remove it.",
        edit=callback("EvalSchedule", evals=2),
    ),
    "unknown section": Case("optimizer.lr is not an option; pipelite fit --help lists the options.",
        edit={"optimizer": {"lr": 1}}),
    "number for a section": Case("trainer is 3; put the options of trainer there.", edit={"trainer": 3}),
    "text for a section": Case(
        "data is 'texts'; put the options of data there, or the name of a file that holds them.",
        edit={"data": "texts"},
    ),
    "missing model_dir": Case(f"model.model_dir {GIVEN}", edit={"model.model_dir": None}),
    "missing adapter": Case(f"model.adapter {GIVEN}", edit={"model.adapter": None}),
    "missing rank": Case(f"model.adapter.rank {GIVEN}", edit={"model.adapter.init_args.rank": None}),
    "missing dataset_path": Case(f"data.datasets.dataset_path {GIVEN}", edit={"data.datasets": [{"max_tokens": 9}]}),
    "nothing at all": Case(f"model.model_dir, model.adapter, data.datasets, data.sequence_len {GIVEN}",
        command=["fit"]),
    "text for a number": Case("model.lr must be a number, not fast.", edit={"model.lr": "fast"}),
    "no number": Case("model.lr must be a number, not nan.", ["--model.lr", "nan"]),
    "text for an integer or null": Case(
        "trainer.max_epochs must be an integer or null, not many.", edit={"trainer.max_epochs": "many"}
    ),
    "another choice": Case(
        "model.dtype must be one of 'bfloat16', 'float32', not float64.", edit={"model.dtype": "float64"}
    ),
    "wrong type in the adapter": Case(
        "model.adapter.rank must be an integer, not high.", edit={"model.adapter.init_args.rank": "high"}
    ),
    "wrong type in the strategy": Case(
        "trainer.strategy.pipeline_stages must be an integer, not two.", edit=strategy(pipeline_stages="two")
    ),
    "wrong type in a callback": Case(
        "trainer.callbacks.evals_per_epoch must be an integer, not often.",
        edit=callback("EvalSchedule", evals_per_epoch="often"),
    ),
    "unknown adapter": Case(
        "model.adapter: there is no class Lora; give its class_path, as in package.module.Lora.",
        edit={"model.adapter": "Lora"},
    ),
    "class_path that cannot be imported": Case(
        "model.adapter: class_path lightning_pipelite.adapters.Lora cannot be imported (module "
        "'lightning_pipelite.adapters' has no attribute 'Lora'); correct it.",
        edit={"model.adapter.class_path": "lightning_pipelite.adapters.Lora"},
    ),
    "class that is no adapter": Case(
        "model.adapter: class_path torch.nn.Linear is not a subclass of Adapter; give one that is.",
        edit={"model.adapter.class_path": "torch.nn.Linear"},
    ),
    "tokenizer of its own": Case(
        "data.tokenizer_dir is always model.model_dir; leave it out.", ["--data.tokenizer_dir", "model"]
    ),
    # The environment
    "variable that is no option": Case(
        "the environment variable PIPELITE_FIT__TRAINER__MAX_STEP is not an option; did you mean "
        "PIPELITE_FIT__TRAINER__MAX_STEPS?",
        environment={"PIPELITE_FIT__TRAINER__MAX_STEP": "3"},
    ),
    "variable for a part of an option": Case(
        "the environment variable PIPELITE_FIT__MODEL__ADAPTER__RANK is not an option; give all of "
        "PIPELITE_FIT__MODEL__ADAPTER as JSON.",
        environment={"PIPELITE_FIT__MODEL__ADAPTER__RANK": "3"},
    ),
    "variable of a wrong type": Case(
        "trainer.max_steps must be an integer, not many.", environment={"PIPELITE_FIT__TRAINER__MAX_STEPS": "many"}
    ),
    "variable with a damaged file": Case(
        "the configuration file bad.yaml holds no options; write them as in model: ...",
        prepare=file("bad.yaml", ""),
        environment={"PIPELITE_FIT__CONFIG": "bad.yaml"},
    ),
    # The model
    "no model there": Case("none is not a directory; model_dir must name a local Hugging Face model.",
        ["--model.model_dir", "none"]),
    "file as a model": Case("config.yaml is not a directory; model_dir must name a local Hugging Face model.",
        ["--model.model_dir", "config.yaml"]),
    "model without config.json": Case(
        "{job}/texts/config.json does not exist; give the directory of a Hugging Face model.",
        ["--model.model_dir", "{job}/texts"],
    ),
    "truncated weights": Case(
        "copy/model.safetensors has {size} bytes but its header asks for {whole}; fetch it again.",
        ["--model.model_dir", "copy"],
        prepare=copied_model(truncate),
    ),
    "model without weights": Case(
        "copy has neither model.safetensors nor model.safetensors.index.json; fetch the model's weights.",
        ["--model.model_dir", "copy"],
        prepare=copied_model(lambda model: (model / "model.safetensors").unlink()),
    ),
    "model without a tokenizer": Case(
        "No tokenizer can be loaded from copy (",
        ["--model.model_dir", "copy"],
        prepare=copied_model(lambda model: [path.unlink() for path in model.glob("tokenizer*")] and None),
    ),
    "whole weights in 4 bits": Case(
        "load_in_4bit cannot be used with Full: 4-bit weights do not train; use LoRA.",
        edit={"model.load_in_4bit": True, "model.adapter": "lightning_pipelite.adapters.Full"},
    ),
    "beta2 of 1": Case("model.beta2 must be at least 0 and less than 1, not 1.0.", edit={"model.beta2": 1.0}),
    "rank 0": Case("rank is 0; set it to 1 or more.", edit={"model.adapter.init_args.rank": 0}),
    "layer that the model lacks": Case(
        "layers_to_transform: the model has no decoder layer 4; its layers are 0 to 3.",
        edit={"model.adapter.init_args.layers_to_transform": "2:4"},
    ),
    "target in no list": Case(
        f"target_modules: 'query' matches no module; the model has {MODULES}.",
        edit={"model.adapter.init_args.target_modules": ["q_proj", "query"]},
    ),
    "target that no pattern matches": Case(
        f"target_modules: '.*query' matches no module; the model has {MODULES}.",
        edit={"model.adapter.init_args.target_modules": ".*query"},
    ),
    # The data
    "no dataset": Case("data.datasets is empty: list at least one dataset with its dataset_path.",
        edit={"data.datasets": []}),
    "no such file": Case(
        "dataset_path none/*.txt matches no file: name a file, a directory or a glob of .txt, .json, .jsonl, .parquet, "
        ".arrow.",
        edit={"data.datasets": [{"dataset_path": "none/*.txt"}]},
    ),
    "empty file": Case(
        "{here}/empty.txt holds no document: remove it from the dataset, or fill it.",
        edit={"data.datasets": [{"dataset_path": "empty.txt"}]},
        prepare=file("empty.txt", ""),
    ),
    "bad line": Case(
        "{here}/bad.jsonl, line 2: not valid JSON (Expecting ',' delimiter, column 13); correct the line.",
        edit={"data.datasets": [{"dataset_path": "bad.jsonl"}]},
        prepare=file("bad.jsonl", '{"text": "a"}\n{"text": "b"\n'),
    ),
    "sequence_len 100": Case("data.sequence_len is 100: give a positive multiple of 64, the size of a GPU tile.",
        edit={"data.sequence_len": 100}),
    "eval_fraction 2": Case("data.eval_fraction is 2.0: give a number from 0 to below 1.",
        edit={"data.eval_fraction": 2.0}),
    "less data than a step": Case(
        "The training set has {sequences} sequences of 64 tokens, but one step takes 2000 (1000 micro-batches on each "
        "of 2 replicas): lower trainer.accumulate_grad_batches or data.sequence_len, or add data.",
        edit={"trainer.accumulate_grad_batches": 1000, "trainer.devices": 2},
    ),
    "nothing to validate on": Case(
        "there is nothing to validate on: give data.eval_fraction a value above 0, or list data.eval_datasets.",
        edit={"data.eval_fraction": 0.0},
        command=["validate", "--config", "config.yaml"],
    ),
    # The trainer and the strategy
    "stages that do not divide the devices": Case(
        "pipeline_stages=2 must divide the number of devices (3); change pipeline_stages, or devices and num_nodes.",
        edit={"trainer.devices": 3, **strategy(pipeline_stages=2)},
    ),
    "more stages than layers": Case(
        "pipeline_stages=5 is more than the 4 layers of the model; use at most 4.",
        edit={"trainer.devices": 5, **strategy(pipeline_stages=5)},
    ),
    "unknown partition_method": Case(
        "partition_method must be uniform, parameters or type:REGEX, not 'best'.",
        edit=strategy(partition_method="best"),
    ),
    "timeout below 0": Case("strategy: timeout must be a positive number of seconds, not -1.0.",
        edit=strategy(timeout=-1)),
    "precision": Case(
        "Trainer(precision='bf16-mixed') is not supported by PipeLiteStrategy: every layer keeps the dtype that the "
        "module gives it (PipeLiteModule has dtype=); leave precision out.",
        edit={"trainer.precision": "bf16-mixed"},
    ),
    "another strategy": Case(
        "PipeLiteModule trains under PipeLiteStrategy, not DDPStrategy: set trainer.strategy to pipelite.",
        edit={"trainer.strategy": "ddp", "trainer.devices": 2},
    ),
    "no strategy at all": Case(
        "PipeLiteModule trains under PipeLiteStrategy, not SingleDeviceStrategy: set trainer.strategy to pipelite.",
        edit={"trainer.strategy": "auto"},
    ),
    "unknown strategy": Case(
        "trainer: You selected an invalid strategy name: `strategy='pipelight'`", edit={"trainer.strategy": "pipelight"}
    ),
    "no device": Case(
        "trainer: `Trainer(devices=0)` value is not a valid input using cpu accelerator.",
        edit={"trainer.devices": 0},
    ),
    "steps below 0": Case(
        "trainer: `max_steps` must be a non-negative integer or -1 (infinite steps). You passed in -5.",
        edit={"trainer.max_steps": -5},
    ),
    "no micro-batch a step": Case("trainer.accumulate_grad_batches is 0; give a number above 0, or leave it out.",
        edit={"trainer.accumulate_grad_batches": 0}),
    "clipping below 0": Case("trainer.gradient_clip_val is -1.0; give a number above 0, or leave it out.",
        edit={"trainer.gradient_clip_val": -1.0}),
    "seed below 0": Case("seed_everything is -1; give an integer from 0 to 4294967295.", edit={"seed_everything": -1}),
    "no evaluation in an epoch": Case("EvalSchedule: evals_per_epoch must be at least 1, not 0.",
        edit=callback("EvalSchedule", evals_per_epoch=0)),
    # What is on disk
    "checkpoint that is not there": Case(
        "ckpt_path: none is not a checkpoint (a directory with manifest.json); name one, or leave it out.",
        ["--ckpt_path", "none"],
    ),
    "file as a checkpoint": Case(
        "ckpt_path: config.yaml is not a checkpoint (a directory with manifest.json); name one, or leave it out.",
        ["--ckpt_path", "config.yaml"],
    ),
    "best checkpoint of nothing": Case(
        "ckpt_path: best is not a checkpoint (a directory with manifest.json); name one, or leave it out.",
        ["--ckpt_path", "best"],
    ),
    "checkpoint to validate that is not there": Case(
        "ckpt_path: none is not a checkpoint (a directory with manifest.json); name one, or leave it out.",
        ["--ckpt_path", "none"],
        command=["validate", "--config", "config.yaml"],
    ),
    "output over something else": Case(
        "{here}/output holds thesis.tex, which saving would delete; move it or save to another place.",
        edit=callback("SaveTrained", output_dir="output"),
        prepare=file("output/thesis.tex", "Of the years of my life"),
    ),
    "output over a file": Case(
        "{here}/output exists and is not a plain directory; choose another place to save to.",
        edit=callback("SaveTrained", output_dir="output"),
        prepare=file("output", ""),
    ),
    "output that cannot be written": Case(
        "config.yaml/output cannot be written (File exists); choose another place to save to.",
        edit=callback("SaveTrained", output_dir="config.yaml/output"),
    ),
    "output over the model": Case(
        "{job}/model holds config.json, which saving would delete; move it or save to another place.",
        edit=callback("SaveTrained", output_dir="{job}/model"),
    ),
    "output nowhere": Case("SaveTrained: output_dir is empty; name the directory to write.",
        edit=callback("SaveTrained", output_dir="")),
}  # fmt: skip


def edited(config: Config, edit: dict[str, Any]) -> Config:
    for key, value in edit.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return config


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name: str, pipelite: Callable[..., SimpleNamespace], job: Path) -> None:
    case, here = CASES[name], Path.cwd()
    weights = (job / "model" / "model.safetensors").stat().st_size
    places = {"job": job, "here": here, "size": weights - 100, "whole": weights, "sequences": "SEQUENCES"}

    def filled(text: str) -> str:
        for place, value in places.items():
            text = text.replace("{" + place + "}", str(value))
        return text

    config = yaml.safe_dump(edited(options(job), case.edit))
    (here / "config.yaml").write_text(filled(config))
    case.prepare(here, job)
    os.environ.update(case.environment)
    before = {
        path: path.read_bytes() for folder in (here, job / "model") for path in folder.rglob("*") if path.is_file()
    }

    result = pipelite(*case.command, *map(filled, case.arguments))

    said = filled(case.says)
    for number in [word for word in result.err.split() if word.isdigit()] if "SEQUENCES" in said else []:
        said = said.replace("SEQUENCES", number)
    if case.says.endswith((".", "?")) or "..." in case.says:
        assert result.err == f"pipelite: error: {said}\n"
    else:  # the rest is a library's
        assert result.err.startswith(f"pipelite: error: {said}")
        assert result.err.endswith("\n")
        assert result.err.count("\n") == 1
    assert result.code == 2
    assert not result.started
    assert not result.left
    assert {path: path.read_bytes() for path in before} == before


# What the rest prints


def test_help_and_version(pipelite: Callable[..., SimpleNamespace]) -> None:
    assert pipelite("--version").out == f"pipelite {__version__}\n"
    top = pipelite("--help")
    assert top.code == 0
    assert top.err == ""
    assert "fit" in top.out
    assert "validate" in top.out
    fit = pipelite("fit", "--help")
    assert fit.code == 0
    for option in ("--model.activation_memory", "--trainer.max_steps", "--data.eval_fraction", "--ckpt_path"):
        assert option in fit.out
    assert "PIPELITE_FIT__TRAINER__MAX_STEPS" in fit.out
    assert "the learning rate, approached by" in " ".join(fit.out.split())  # a docstring's


def test_printed_configuration_can_be_used_again(pipelite: Callable[..., SimpleNamespace], job: Path) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(options(job)))
    os.environ["PIPELITE_FIT__TRAINER__MAX_EPOCHS"] = "7"
    first = pipelite("fit", "--config", "config.yaml", "--model.lr", "0.5", "--print_config")
    assert first.code == 0
    assert first.err == ""
    printed = yaml.safe_load(first.out)
    assert printed["model"]["lr"] == 0.5  # the command line
    assert printed["trainer"]["max_epochs"] == 7  # the environment
    assert printed["trainer"]["max_steps"] == 1  # the file
    assert printed["trainer"]["strategy"]["init_args"]["pipeline_stages"] == 1  # a default
    Path("again.yaml").write_text(first.out)
    del os.environ["PIPELITE_FIT__TRAINER__MAX_EPOCHS"]
    assert pipelite("fit", "--config", "again.yaml", "--print_config").out == first.out


def test_classes_have_short_names(pipelite: Callable[..., SimpleNamespace], job: Path) -> None:
    config = edited(options(job), {"model.adapter": {"class_path": "Full"}})
    Path("config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--trainer.strategy.pipeline_stages", "2", "--trainer.callbacks+=EvalSchedule"]
    printed = yaml.safe_load(pipelite("fit", "--config", "config.yaml", *arguments, "--print_config").out)
    assert printed["model"]["adapter"]["class_path"] == "lightning_pipelite.adapters.Full"
    assert printed["trainer"]["strategy"]["init_args"]["pipeline_stages"] == 2
    assert printed["trainer"]["callbacks"][0]["class_path"] == "lightning_pipelite.callbacks.EvalSchedule"


def test_saved_configuration_replaces_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import SaveConfigCallback

    from lightning_pipelite.trainer_cli import SaveConfig

    saved: list[str] = []
    monkeypatch.setattr(SaveConfigCallback, "setup", lambda self, *args: saved.append(self.config_filename))
    (tmp_path / "config.yaml").write_text("mine")

    def setup(logger: object) -> None:
        trainer: Any = SimpleNamespace(logger=logger, log_dir=str(tmp_path), is_global_zero=True)
        SaveConfig(None, None).setup(trainer, None, "fit")  # type: ignore[arg-type]

    setup(logger=None)
    assert saved == []
    setup(logger=object())
    (tmp_path / "config-2.yaml").touch()
    setup(logger=object())
    assert saved == ["config-2.yaml", "config-3.yaml"]


# Real processes

COUNTS_STARTS = """
import os
if os.environ.get("LOCAL_RANK") or not os.path.exists(os.environ["STARTS"]):
    with open(os.environ["STARTS"], "a") as file:
        file.write(os.environ.get("LOCAL_RANK", "first") + "\\n")
else:
    with open(os.environ["STARTS"], "a") as file:
        file.write("further\\n")
"""


def processes(here: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the command as processes; also tell which Python processes were started."""
    (here / "site").mkdir(exist_ok=True)
    (here / "site" / "sitecustomize.py").write_text(COUNTS_STARTS)
    starts = here / "starts"
    starts.unlink(missing_ok=True)
    paths = [str(here / "site"), str(Path(cli.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "lightning_pipelite", *arguments],
        cwd=here,
        env={**variables, "PYTHONPATH": os.pathsep.join(paths), "STARTS": str(starts), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return result, starts.read_text().split()


def test_refusal_for_two_devices_starts_no_process(tmp_path: Path, job: Path) -> None:
    config = edited(options(job, devices=2, logger=True, enable_checkpointing=True), strategy(pipeline_stages=2))
    config = edited(config, {"trainer.strategy.init_args.partition_method": "type:Mamba"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result, starts = processes(tmp_path, "fit", "--config", "config.yaml")
    assert result.stderr == (
        "pipelite: error: partition_method: 'Mamba' matches none of the layer types LlamaDecoderLayer.\n"
    )
    assert result.stdout == ""
    assert result.returncode == 2
    assert starts == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "site", "starts"}


def test_two_devices_train_and_print_only_what_matters(tmp_path: Path, job: Path) -> None:
    config = edited(
        options(job, devices=2, accumulate_grad_batches=2, enable_progress_bar=False), strategy(pipeline_stages=2)
    )
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning_pipelite.callbacks.EvalSchedule", "init_args": {"evals_per_epoch": 1}},
        {"class_path": "lightning_pipelite.callbacks.SaveTrained", "init_args": {"output_dir": "deep/down/lora"}},
    ]
    config["model"]["load_in_4bit"] = True
    del config["trainer"]["max_steps"]
    written = yaml.safe_dump(config)
    (tmp_path / "config.yaml").write_text(written)
    result, starts = processes(tmp_path, "fit", "--config", "config.yaml", PIPELITE_FIT__TRAINER__MAX_STEPS="2")
    assert result.returncode == 0, result.stderr
    assert starts == ["first", "1"]
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["train:", "19"], ["eval:", "1"], ["dataset", f"{job}/texts/*.txt:"], ["packed", "data:"], ["step", "0:"],
        ["step", "2:"], ["saved", "what"],
    ]  # fmt: skip
    assert lines[-1] == "saved what was trained to deep/down/lora"
    progress = [line for line in result.stderr.replace("\r", "\n").splitlines() if line]
    assert all(line.startswith("Loading weights:") for line in progress), result.stderr
    assert len({line.split("|")[-1].split("[")[0] for line in progress if "100%" in line}) == 1  # rank 0's alone
    assert (tmp_path / "config.yaml").read_text() == written  # there is no logger: nothing is saved over it
    adapter = json.loads((tmp_path / "deep" / "down" / "lora" / "adapter_config.json").read_text())
    assert adapter["r"] == 2
