"""Wrong values that are reported before the slow imports, and values that are left to later checks."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.early import check_early
from lightning_pipelite.cli.early_commands import check_command_values
from lightning_pipelite.cli.early_values import check_values
from lightning_pipelite.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
LORA = {"class_path": "lightning_pipelite.adapters.LoRA", "init_args": {"rank": 2}}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a model whose weights are a single number."""
    monkeypatch.chdir(tmp_path)
    left = [name for name in os.environ if name.endswith(("RANK", "_PROCID")) or name.startswith(("PL_", "PIPELITE_"))]
    for name in left:  # set by an earlier test
        monkeypatch.delenv(name)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(safetensors(w=[1]))
    return tmp_path


def safetensors(**shapes: list[int]) -> bytes:
    """Return the content of a safetensors file of float32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def written(**sections: Any) -> list[str]:
    """Write a configuration; return the arguments that name it."""
    content = {"model": {"model_dir": "model", "adapter": LORA, **sections.pop("model", {})}, **sections}
    Path("a.yaml").write_text(yaml.safe_dump(content))
    return ["--config", "a.yaml"]


def callback(name: str, **init_args: Any) -> dict[str, Any]:
    return {"callbacks": [{"class_path": name, "init_args": init_args}]}


WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    # Types
    ({"model": {"lr": "fast"}}, [], "model.lr must be a number, not fast."),
    ({}, ["--model.lr", "fast"], "model.lr must be a number, not fast."),
    ({}, ["--model.lr=nan"], "model.lr must be a number, not nan."),
    ({"model": {"packed": "perhaps"}}, [], "model.packed must be true or false, not perhaps."),
    ({"trainer": {"max_steps": 1.5}}, [], "trainer.max_steps must be an integer, not 1.5."),
    ({}, ["--trainer.max_epochs=many"], "trainer.max_epochs must be an integer or null, not many."),
    ({}, ["--model.adapter.rank=high"], "model.adapter.rank must be an integer, not high."),
    ({}, ["--trainer.strategy.pipeline_stages=two"], "trainer.strategy.pipeline_stages must be an integer, not two."),
    (
        {"trainer": callback("EvalSchedule", evals_per_epoch="often")},
        [],
        "trainer.callbacks.evals_per_epoch must be an integer, not often.",
    ),
    # Options of classes
    (
        {"trainer": callback("EarlyStopping", patients=2)},
        [],
        "trainer.callbacks.patients is not an option; correct its name or remove it.",
    ),
    (
        {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}}},
        [],
        "model.optimizer.lr is not an option; correct its name or remove it.",
    ),
    (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"beta": 1.0}}}},
        [],
        "model.optimizer.beta is not an option; correct its name or remove it.",
    ),
    ({"model": {"adapter": "Lora"}}, [], "model.adapter: there is no class Lora; give its class_path, as in package"),
    ({"model": {"adapter": "LoRA"}}, [], "model.adapter.rank must be given, in the configuration file or on the"),
    # Ranges
    ({"trainer": {"max_steps": -5}}, [], "trainer.max_steps is -5; give a number of steps, or -1 for no limit."),
    ({}, ["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches is 0; give a number above 0,"),
    ({}, ["--trainer.devices", "two"], "trainer.devices is 'two'; give the number of devices, a list"),
    ({}, ["--trainer.max_time=soon"], "trainer.max_time is 'soon'; write it as days:hours:minutes:seconds"),
    ({}, ["--trainer.accelerator=quantum"], "trainer.accelerator is 'quantum'; set it to gpu, cpu or auto."),
    ({}, ["--seed_everything=-1"], "seed_everything is -1; give an integer from 0 to 4294967295."),
    ({"model": {"beta2": 1.0}}, [], "model.beta2 must be at least 0 and less than 1, not 1.0."),
    ({}, ["--model.warmup_steps=3"], "model.warmup_steps is 3 with schedule rms_ratio; it must be 0 or more"),
    ({}, ["--model.adapter.init_args.dtype=float8"], "dtype is 'float8'; set it to one of float32, bfloat16, float16."),
    ({}, ["--model.adapter.layers_to_transform=3:2"], "layers_to_transform: 3:2 is a reversed range; write 2:3."),
    ({}, ["--trainer.strategy.partition_method=best"], "partition_method must be uniform, parameters, type:REGEX"),
    ({}, ["--trainer.strategy.timeout=-1"], "strategy: timeout must be a positive number of seconds, not -1.0."),
    (
        {"model": {"beta1": 0.5, "optimizer": "torch.optim.SGD"}},
        [],
        "model.beta1, beta2 and eps apply to the default optimizer; set them as options of model.optimizer.",
    ),
    # Options that exclude each other, or that the strategy does not support
    (
        {},
        ["--model.load_in_4bit=true", "--model.load_in_fp8", "true"],
        "load_in_4bit and load_in_fp8 are mutually exclusive",
    ),
    ({}, ["--model.fp8_transpose_cache=true"], "fp8_transpose_cache applies to weights in FP8; set it to false, or"),
    ({}, ["--model.bnb_4bit_use_double_quant=true"], "bnb_4bit_use_double_quant applies to weights in 4 bits; set"),
    ({"trainer": {"strategy": "ddp"}}, [], "PipeLiteModule requires PipeLiteStrategy, not ddp: set"),
    ({}, ["--trainer.precision=bf16-mixed"], "Trainer(precision='bf16-mixed') is not supported by PipeLiteStrategy"),
    ({"trainer": {"sync_batchnorm": True}}, [], "Trainer(sync_batchnorm=True) is not supported by PipeLiteStrategy"),
    (
        {"trainer": {"devices": 3}},
        ["--trainer.strategy.pipeline_stages=2"],
        "pipeline_stages=2 must divide the number of devices (3)",
    ),
    ({"data": {"tokenizer_dir": "model"}}, [], "data.tokenizer_dir is always model.model_dir; leave it out."),
    (
        {"trainer": callback("EarlyStopping", monitor="val_loss")},
        [],
        "EarlyStopping: monitor is 'val_loss', which nothing logs; set it to eval/loss",
    ),
    # Files on disk
    ({}, ["--ckpt_path", "none"], "ckpt_path: none is not a checkpoint (a directory with manifest.json)"),
    ({}, ["--ckpt_path=best"], "ckpt_path: `best` is known only to the process that trained the model"),
    (
        {"trainer": callback("TimedCheckpoint", dirpath="kept")},
        ["--ckpt_path=last"],
        "ckpt_path: there is no checkpoint in ",
    ),
    (
        {"trainer": callback("SaveTrained", output_dir="model")},
        [],
        "model holds config.json, which saving would delete; move it or save to another place.",
    ),
]


@pytest.mark.parametrize(("sections", "words", "says"), WRONG)
def test_what_is_wrong(job: Path, sections: dict[str, Any], words: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_values([*written(**sections), *words], trains=True)
    assert says in str(refused.value)


def test_what_the_model_lacks(job: Path) -> None:
    words, model = written(), job / "model"
    (model / "config.json").write_text('{"model_type": "llamma"}')
    with pytest.raises(ConfigurationError, match="its model_type is llamma; correct it"):
        check_values(words, trains=True)
    (model / "config.json").write_text('{"model_type": "llamma", "auto_map": {}}')
    with pytest.raises(ConfigurationError, match="requires the model's own code; set trust_remote_code"):
        check_values(words, trains=True)
    check_values([*words, "--model.trust_remote_code=true"], trains=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="has pickled weights"):
        check_values(words, trains=True)
    check_values([*words, "--model.allow_pickled_weights=true"], trains=True)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": "1.safetensors"}}')
    with pytest.raises(ConfigurationError, match=r"1.safetensors does not exist; fetch the missing weight file"):
        check_values(words, trains=True)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "two files"])
def test_targets_are_held_against_headers_that_are_read_once(
    job: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    model, shapes = job / "model", {"0.norm.weight": [4], "1.q_proj.weight": [4, 4]}
    files = {"model.safetensors": shapes}
    if sharded:
        (model / "model.safetensors").unlink()
        files = {f"{number}.safetensors": {name: shape} for number, (name, shape) in enumerate(shapes.items())}
        index = {name: file for file, held in files.items() for name in held}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file, held in files.items():
        (model / file).write_bytes(safetensors(**held))
    opened: Counter[str] = Counter()
    really_open = Path.open

    def counted(path: Path, *args: Any, **options: Any) -> Any:
        opened[path.name] += path.suffix == ".safetensors"
        return really_open(path, *args, **options)

    words = [*written(), "--model.adapter.target_modules"]
    monkeypatch.setattr(Path, "open", counted)
    check_values([*words, "[q_proj]"], trains=True)
    assert +opened == dict.fromkeys(files, 1)
    with pytest.raises(
        ConfigurationError, match=r"target_modules matches 0\.norm, which has no matrix; name only linear"
    ):
        check_values([*words, "[q_proj, norm]"], trains=True)
    assert +opened == dict.fromkeys(files, 2)


def test_targets_in_pickled_weights_are_left_alone(job: Path) -> None:
    (job / "model" / "model.safetensors").rename(job / "model" / "pytorch_model.bin")
    words = ["--model.allow_pickled_weights=true", "--model.adapter.target_modules", "[w]"]
    check_values([*written(), *words], trains=True)


RIGHT: list[tuple[dict[str, Any], list[str]]] = [
    ({"model": {"lr": "1e-5", "eps": 1e-8, "warmup_steps": 3, "schedule": "cosine"}}, ["--model.compile_layers=null"]),
    ({"trainer": {"devices": [0, 1], "precision": 32, "max_epochs": None, "limit_train_batches": 1}}, []),
    ({"trainer": {"devices": "0,1", "precision": "32-true", "max_time": "00:01:00:00"}}, ["--trainer.max_steps=-1"]),
    ({"trainer": {"devices": 4, "num_nodes": 2}}, ["--trainer.strategy.pipeline_stages=8"]),
    ({"trainer": {"strategy": "pipelite", "devices": 3}}, ["--trainer.accelerator=auto"]),
    # Later values override earlier ones
    ({"model": {"lr": "fast"}}, ["--model.lr=1e-5"]),
    ({"trainer": {"devices": 3}}, ["--trainer.strategy.pipeline_stages=2", "--trainer.devices=4"]),
    # The user's own classes may take any options and register any names
    ({"model": {"adapter": {"class_path": "my.Adapter", "init_args": {"rank": "high", "dtype": "float8"}}}}, []),
    ({"trainer": {**callback("my.Callback", monitor=3), "accelerator": "quantum", "strategy": "mine"}}, []),
    (
        {
            "trainer": {
                "callbacks": [{"class_path": "my.Logger"}, callback("EarlyStopping", monitor="x")["callbacks"][0]]
            }
        },
        [],
    ),
    ({"model": {"optimizer": {"class_path": "my.Optimizer", "init_args": {"lr": 1.0}}}}, []),
    ({"trainer": {"callbacks": {"class_path": "my.Callback", "init_args": {"output_dir": "model"}}}}, []),
    ({"model": {"adapter": "Mine"}, "trainer": callback("my.Callback")}, []),
    # Not checked here
    ({"model": {"beta1": 0.5}}, ["--model.optimizer=null"]),
    ({"model": {"adapter": "LoRA"}}, ["--model.adapter.rank=3", "--model.adapter.target_modules", "[q_proj, k_proj]"]),
    ({"trainer": callback("EarlyStopping", monitor="x")}, ["--trainer.callbacks+=LearningRateMonitor"]),
    ({}, ["--model.adapter", "adapter.yaml", "--model.adapter.rank=high"]),
    ({}, ["--trainer.devices=${oc.env:DEVICES}"]),
    ({"trainer": callback("EarlyStopping", monitor="train/loss", mode="min")}, ["--trainer.callbacks.patience=3"]),
    ({"trainer": callback("ModelCheckpoint", monitor="step", dirpath="model")}, ["--ckpt_path=last"]),
    ({"trainer": callback("SaveTrained", output_dir="new")}, []),
    ({"trainer": {"max_steps": "${steps}"}, "model": {"lr": None}}, ["--ckpt_path=null"]),
]


@pytest.mark.parametrize(("sections", "words"), RIGHT)
def test_what_is_not_known_to_be_wrong_passes(job: Path, sections: dict[str, Any], words: list[str]) -> None:
    check_values([*written(**sections), *words], trains=True)


@pytest.mark.parametrize("variable", ["PIPELITE_FIT__MODEL__LR", "PIPELITE_FIT__CONFIG", "PL_TRAINER_DEVICES"])
def test_what_the_environment_says_is_left_alone(job: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    words = [*written(trainer={"devices": "two"}), "--model.lr=fast"]
    monkeypatch.setenv(variable, "1")
    check_values(words, trains=True)


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_the_first_process_looks_for_all(job: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    words = written(trainer=callback("SaveTrained", output_dir="model"))
    monkeypatch.setenv(variable, "1")
    check_values(words, trains=True)


def test_values_that_yaml_reads_in_its_own_way_are_left_alone(job: Path) -> None:
    words = written()
    Path("a.yaml").write_text(
        "model:\n  model_dir: model\n  lr: 2024-01-01\n  packed: 2024-01-01\n  adapter:\n    class_path: LoRA\n"
        "    init_args:\n      rank: 2\n      target_modules: no\n      layers_to_transform: 2:4\n"
        "trainer:\n  max_steps: yes\n  gradient_clip_algorithm: on\n"
    )
    check_values(words, trains=True)


def test_validate_writes_nothing(job: Path) -> None:
    words = written(trainer=callback("SaveTrained", output_dir="model"))
    check_values(words, trains=False)


@pytest.mark.parametrize("path", sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")]))
def test_shipped_configurations_pass(job: Path, path: Path) -> None:
    check_values(["--config", str(path), "--model.model_dir", "model"], trains=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer.max_steps"], "--trainer.max_steps has no value; write one after it."),
        (["--model.lr", "--trainer.max_steps=3"], "--model.lr has no value; write one after it."),
    ],
)
def test_an_option_without_a_value(job: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_early([*written(), *words])
    assert str(refused.value) == says
    check_early([*written(), "--overwrite", "--model.lr", "-3"])


def test_a_section_without_options(job: Path) -> None:
    with pytest.raises(ConfigurationError, match="data is 'texts'; it must hold the options of data, or name a file"):
        check_early(written(data="texts"))
    with pytest.raises(ConfigurationError, match=r"trainer is 3; it must hold the options of trainer\."):
        check_early(written(trainer=3))
    Path("texts").write_text("sequence_len: 64")
    check_early(written(data="texts"))


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        (
            "merge",
            ["--base=model", "--adapter=none", "--output=o"],
            "none has no adapter_config.json; give the directory",
        ),
        (
            "merge",
            ["--base=model", "--adapter=a", "--output=o", "--scale=9"],
            "scale must be greater than -2 and less than 2, not 9",
        ),
        (
            "merge",
            ["--base=model", "--adapter", "[a, b]", "--output=o", "--scale", "[1.0]"],
            "the number of scales is 1, but that of adapters is 2",
        ),
        ("merge", ["--base=model", "--adapter=a", "--output=model"], "output model and input model overlap"),
        (
            "merge",
            ["--base=none", "--adapter=a", "--output=o"],
            "none is not a directory; give the directory of a local",
        ),
        ("convert", ["--checkpoint=model", "--output=o"], "--checkpoint: model is not a checkpoint (a directory with"),
        ("convert", ["--checkpoint=none", "--output=o"], "--checkpoint: none is not a directory"),
        ("analyze", ["--adapter", "model"], "model has no adapter_config.json; give the directory of an adapter."),
        ("export-gguf", ["--base=model", "--adapter=none", "--output=o"], "none has no adapter_config.json"),
        ("export-gguf", ["--base=model", "--adapter=a", "--output=a.yaml"], "a.yaml exists; choose a new file"),
        (
            "export-gguf",
            ["--base=model", "--adapter=a", "--output=o", "--outtype=q4"],
            "outtype must be one of 'f32', 'f16', 'bf16', 'q8_0', not q4.",
        ),
        (
            "control-to-lora",
            ["--base=none", "--adapter=a", "--output=o"],
            "none is not a directory; give the directory of",
        ),
        ("migrate", ["a.toml"], "a.toml cannot be read as TOML (Invalid value"),
        (
            "preview",
            ["--config=none.yaml"],
            "there is no configuration file none.yaml; give the one used for pipelite fit.",
        ),
        ("preview", ["--config=a.yaml", "--sequences=0"], "sequences is 0: give a positive number."),
        ("preview", ["--config=a.yaml", "--sequences=few"], "sequences must be an integer, not few."),
        ("preview", ["--config=a.yaml", "--model.lr=fast"], "model.lr must be a number, not fast."),
        ("check", ["model", "--stages", "two"], "stages must be comma-separated integers, not 'two'."),
    ],
)
def test_commands(job: Path, command: str, words: list[str], says: str) -> None:
    written()
    Path("a.toml").write_text("x = [")
    with pytest.raises(ConfigurationError) as refused:
        check_command_values(command, COMMANDS[command], words)
    assert says in str(refused.value)
    check_command_values(command, COMMANDS[command], [*words, "--help"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("merge", ["--base", "--adapter=a", "--output=o"]),  # the parser reports the error
        ("convert", ["--checkpoint", "--output=o"]),
        ("merge", ["--base=model", "--adapter=a", "--output=o", "--scale=0.5", "--device", "cpu"]),
        ("merge", ["--base=model", "--adapter", "[a]", "--output=o", "--scale", "[0.5]", "--trust_remote_code"]),
        ("analyze", ["--adapter=a", "--base=model"]),
        ("export-gguf", ["--base=model", "--adapter=a", "--output=o", "--inverse", "--outtype=f16"]),
        ("control-to-lora", ["--base=model", "--adapter=a", "--output=o", "--inverse"]),
        ("check", ["model", "--tiny", "--stages", "[1,2x4]"]),
        ("check", ["--tiny", "model"]),
        ("preview", ["--config=a.yaml", "--sequences", "2", "--trainer.devices=2"]),
        ("preview", ["--config=a.yaml", "--model.adapter=LoRA"]),
        ("plan", ["--config=a.yaml", "--memory=24GiB", "--trainer.devices", "2"]),
        ("generate", ["--base=model", "--prompt", "[a, b]", "--temperature=0.5"]),
    ],
)
def test_right_commands_pass(job: Path, command: str, words: list[str]) -> None:
    written()
    (job / "a").mkdir()
    (job / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    check_command_values(command, COMMANDS[command], words)
