"""Answers that come before the slow imports: help, unknown names, missing files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_pipelite import PackedDataModule, PipeLiteModule
from lightning_pipelite.cli.base_name import with_own_names
from lightning_pipelite.cli.commands import COMMANDS
from lightning_pipelite.cli.early import check_all_there, check_command, check_early
from lightning_pipelite.cli.error_messages import explain
from lightning_pipelite.cli.help import OPTIONS, overview, short_help
from lightning_pipelite.cli.option_names import FOREIGN, names_of_classes, option_names
from lightning_pipelite.cli.option_values import choices
from lightning_pipelite.errors import ConfigurationError

CONFIG = "model:\n  model_dir: {}\n  lr: 1\ndata:\n  sequence_len: 64\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG.format(tmp_path))
    return str(path)


def test_names_are_those_of_the_classes() -> None:
    import inspect

    for section, kind in (("trainer", Trainer), ("model", PipeLiteModule), ("data", PackedDataModule)):
        for name in list(inspect.signature(kind.__init__).parameters)[1:]:
            assert f"{section}.{name}" in option_names()
    for name in FOREIGN.values():
        assert name in {*option_names(), *names_of_classes()}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer.max_step", "3"], "--trainer.max_step is not an option; did you mean --trainer.max_steps?"),
        (["--lr=3"], "--lr is not an option; did you mean --model.lr?"),
        (["--data.lr", "3"], "--data.lr is not an option; did you mean --model.lr?"),
        (["--lora_alpha", "3"], "--lora_alpha is not an option; a LoRA's scale is 1 here"),
        (["--model.r", "3"], "--model.r is not an option; did you mean --model.adapter.init_args.rank?"),
        (["--model.adapter.r", "3"], "did you mean --model.adapter.init_args.rank?"),
        (["--learning_rate", "3"], "did you mean --model.lr?"),
        (["--num_train_epochs", "3"], "did you mean --trainer.max_epochs?"),
        (["--per_device_train_batch_size", "3"], "accumulate_grad_batches to the number of sequences per step"),
        (["--data.max_seq_length", "3"], "did you mean --data.sequence_len?"),
        (["--trainer.gradient_accumulation_steps", "3"], "did you mean --trainer.accumulate_grad_batches?"),
        (["--model.load_in_8bit", "true"], "set model.load_in_4bit, or model.load_in_fp8 for eight bits"),
        (["--model.xyz", "3"], "--model.xyz is not an option; pipelite fit --help-all lists the options."),
        (["--model.activation_memory=kep"], "not kep; did you mean keep?"),
        (
            ["--model.activation_memory", "gradient_checkpointing"],
            "did you mean recompute?",
        ),
        (["--model.dtype", "bf16"], "must be one of 'bfloat16', 'float32', not bf16; did you mean bfloat16?"),
        (["--model.attn_implementation=flash_attention_2"], "did you mean varlen?"),
        (["--model.schedule", "cosine_with_warmup"], "'cosine', not cosine_with_warmup; did you mean cosine?"),
        (
            ["--model.schedule", "linear"],
            "must be one of 'rms_ratio', 'constant', 'cosine', not linear.",
        ),
        (["--data.packing", "bestfit"], "or null, not bestfit; did you mean best_fit?"),
        (["--data.long_conversations=truncate"], "did you mean drop?"),
        (["--model.adaptr.init_args.rank", "3"], "did you mean --model.adapter.init_args.rank?"),
        (["--pipeline_stages", "2"], "did you mean --trainer.strategy.init_args.pipeline_stages?"),
        (["--model.adapter.init_args.rnk", "3"], "did you mean --model.adapter.init_args.rank?"),
        (["--model.adapter.drop_out=0"], "did you mean --model.adapter.init_args.dropout?"),
        (["--rank=8"], "did you mean --model.adapter.init_args.rank?"),
        (["--target_modules=q_proj"], "did you mean --model.adapter.init_args.target_modules?"),
        (["--data.dataset=x"], "did you mean --data.datasets?"),
        (["--bnb_4bit_quant_type", "nf4"], "the type is always nf4: leave it out, and set model.load_in_4bit."),
        (["--model.torch_dtype", "bfloat16"], "did you mean --model.dtype?"),
        (["--eval_steps", "10"], "add the callback EvalSchedule to trainer.callbacks"),
        (["--device", "cpu"], "did you mean --trainer.accelerator?"),
        (["--trainer.gpus=2"], "did you mean --trainer.devices?"),
        (["a.yaml"], "a.yaml is not an option; did you mean --config a.yaml?"),
        (
            ["--data.datasets", "x", __file__],
            "is not an option; if the shell expanded a pattern, put the pattern in",
        ),
        (["--data.seed=1", "now"], "now is not an option; pipelite fit --help lists the options."),
        (["--config", "none.yaml"], "--config: File does not exist: '.*none.yaml'"),
        (["--model.model_dir", "some/where/else"], "some/where/else is not a directory; model_dir must name a local"),
        (["--model.model_dir", "meta-llama/X"], "hf download meta-llama/X --local-dir models/X, and give models/X"),
    ],
)
def test_what_is_wrong(config: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says.replace("?", r"\?")):
        check_early(["--config", config, *words])


def test_what_is_missing(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = "must be given, in the configuration file or on the command line."
    for words, missing in (
        ([], "model.model_dir, model.adapter, data.datasets, data.sequence_len"),
        (["--config", config], "model.adapter, data.datasets"),
        (["--config", config, "--data.datasets+=[]"], "model.adapter"),
        (["--model.adapter.rank=3", "--data.datasets", "x"], "model.model_dir, data.sequence_len"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            check_all_there(words)
        assert str(refused.value) == f"{missing} {given}"
    for words in (["--model", config], ["--config", "model: {}"], ["--print_config"], ["-cx"]):
        check_all_there(words)
    monkeypatch.setenv("PIPELITE_FIT__CONFIG", "x")
    check_all_there([])


def test_keys_of_files(tmp_path: Path) -> None:
    for edit, says in (
        ("  max_seq_length: 3\n", "data.max_seq_length is not an option; did you mean data.sequence_len?"),
        ("  packing: fit_best\n", "data.packing must be one of 'concatenate', 'best_fit' or null, not fit_best"),
        ("learning_rate: 3\n", "learning_rate is not an option; did you mean model.lr?"),
    ):
        (tmp_path / "a.yaml").write_text(CONFIG.format(tmp_path) + edit)
        with pytest.raises(ConfigurationError, match=says.replace("?", r"\?")):
            check_early(["--config", str(tmp_path / "a.yaml")])


def test_what_is_right_passes(config: str) -> None:
    check_early(
        ["--config", config, "--trainer.callbacks+=EvalSchedule", "--trainer.callbacks.evals_per_epoch", "-3",
         "--model.adapter", "LoRA", "--model.adapter.rank=3", "--model.adapter.help", "--ckpt_path", "last",
         "--overwrite", "--print_config", "--trainer.strategy.init_args.pipeline_stages", "2", "--seed_everything=1"]
    )  # fmt: skip
    check_early(["--config", config, "--model.model_dir", "none", "--print_config=skip_null"])
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        check_early(["--config", str(path), "--model.model_dir", "."])


@pytest.mark.parametrize("option", ["alpha", "r", "lora_dropout", "init_args.alpha"])
def test_an_adapter_of_the_users_own_has_its_own_options(config: str, tmp_path: Path, option: str) -> None:
    given = f"--model.adapter.{option}=3"
    check_early(["--config", config, given, "--model.adapter", "my.Adapter"])
    inner = option.rpartition(".")[2]
    own = f"  adapter:\n    class_path: my.Adapter\n    init_args:\n      {inner}: 3\n"
    (tmp_path / "b.yaml").write_text(CONFIG.format(tmp_path).replace("  lr: 1\n", f"  lr: 1\n{own}"))
    check_early(["--config", str(tmp_path / "b.yaml"), given])
    with pytest.raises(ConfigurationError, match=r"alpha|did you mean"):
        check_early(["--config", str(tmp_path / "b.yaml"), given, "--model.adapter=lightning_pipelite.LoRA"])
    (tmp_path / "b.yaml").write_text((tmp_path / "b.yaml").read_text().replace("my.Adapter", "LoRA"))
    with pytest.raises(ConfigurationError, match=r"alpha|did you mean"):
        check_early(["--config", str(tmp_path / "b.yaml")])


@pytest.mark.parametrize("option", ["alpha", "init_args.ranks"])
def test_an_adapter_that_is_named_elsewhere_has_its_own_options(
    config: str, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    given = f"--model.adapter.{option}=3"
    inline = "model: {adapter: my.Adapter}"
    check_early(["--config", config, "--config", inline, given])
    with pytest.raises(ConfigurationError, match=r"alpha|did you mean"):
        check_early(["--config", config, given])
    for variable in ("PIPELITE_FIT__MODEL__ADAPTER", "PIPELITE_FIT__CONFIG"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "my.Adapter")
            check_early(["--config", config, given])
            with pytest.raises(ConfigurationError, match=r"alpha|did you mean"):
                check_early(["--config", config, "--model.adapter=LoRA", given])


def test_the_adapter_of_a_nested_file_has_its_own_options(config: str, tmp_path: Path) -> None:
    given = "--model.adapter.init_args.lora_alpha=4"
    (tmp_path / "model.yaml").write_text("model_dir: none\nadapter: {class_path: my.Adapter}\n")
    (tmp_path / "b.yaml").write_text("model: model.yaml\n")
    nested = ["--config", config, "--config", str(tmp_path / "b.yaml")]
    check_early([*nested, given])
    for later in (["--model.adapter=LoRA"], ["--config", "model: {adapter: LoRA}", "--model.adapter=LoRA"]):
        with pytest.raises(ConfigurationError, match="lora_alpha is not an option; a LoRA's scale is 1"):
            check_early([*nested, given, *later])
    with pytest.raises(ConfigurationError, match="other is not a directory"):
        check_early([*nested, "--model.model_dir=other"])


def test_a_file_with_options_of_the_adapter_alone_keeps_its_class(config: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("model: {adapter: {init_args: {lora_alpha: 4}}}\n")
    words = ["--config", str(tmp_path / "b.yaml")]
    (tmp_path / "c.yaml").write_text("model: {adapter: {class_path: my.Adapter}}\n")
    check_early(["--config", str(tmp_path / "c.yaml"), *words])
    for first in ([], ["--config", config], ["--model.adapter=LoRA"]):
        with pytest.raises(ConfigurationError, match="lora_alpha is not an option; a LoRA's scale is 1"):
            check_early([*first, *words])


def test_a_command_leaves_the_options_of_another_adapter_to_its_class(config: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("model: {adapter: {class_path: my.Adapter}}\n")
    given = "--model.adapter.init_args.lora_alpha=4"
    check_command("plan", COMMANDS["plan"], ["--config", str(tmp_path / "b.yaml"), given])
    with pytest.raises(ConfigurationError, match="lora_alpha is not an option; a LoRA's scale is 1"):
        check_command("plan", COMMANDS["plan"], ["--config", config, given])


def test_a_model_that_is_named_elsewhere_is_not_looked_for(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.yaml").write_text(CONFIG.format("none"))
    none = f"--config={tmp_path / 'none.yaml'}"
    for words in ([f"--model={config}"], [f"-c{config}"], ["--config", f"model: {{model_dir: {tmp_path}}}"]):
        check_early([none, *words])
        with pytest.raises(ConfigurationError, match="other is not a directory"):
            check_early([none, *words, "--model.model_dir=other"])
    with pytest.raises(ConfigurationError, match="none is not a directory"):
        check_early([f"--model={config}", none])
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    check_early(["--config", config, f"--model.model_dir=~/{tmp_path.name}"])


def test_commands() -> None:
    with pytest.raises(ConfigurationError, match=r"--bass is not an option; did you mean --base\?"):
        check_command("merge", COMMANDS["merge"], ["--bass", "x"])
    words = ["--config", "x", "--memory", "24GiB", "--trainer.devices", "2"]
    check_command("plan", COMMANDS["plan"], words)
    check_command("plan", COMMANDS["plan"], ["-c", *words[1:]])
    with pytest.raises(ConfigurationError, match=r"did you mean --memory\?"):
        check_command("plan", COMMANDS["plan"], ["--config", "x", "--memmory", "24GiB"])


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("merge", ["--adapter", "a"], "base, output must be given on the command line."),
        ("preview", [], "config must be given on the command line: --config FILE, as for fit."),
        ("convert", ["--output=x"], "checkpoint must be given on the command line."),
    ],
)
def test_what_a_command_needs(command: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_command(command, COMMANDS[command], words)
    assert str(refused.value) == says
    check_command(command, COMMANDS[command], [*words, "--help"])


@pytest.mark.parametrize("option", ["--config", "-c", "--trainer.max_epochs", "--seed_everything"])
@pytest.mark.parametrize("name", ["migrate", "check", "merge"])
def test_what_reads_no_configuration_has_no_options_of_fit(name: str, option: str) -> None:
    assert not COMMANDS[name].reads_configuration
    expected = f"{option} is not an option; pipelite {name} --help lists the options."
    with pytest.raises(ConfigurationError) as refusal:
        check_command(name, COMMANDS[name], ["a.toml", option, "2"])
    assert str(refusal.value) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_commands_are_those_of_their_parsers(name: str) -> None:
    import importlib
    import inspect

    command = COMMANDS[name]
    parameters = inspect.signature(getattr(importlib.import_module(command.module), command.function)).parameters
    required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    assert {*command.options} == {*parameters} - (required if command.positional else set())


def test_help_in_layers() -> None:
    lines = overview().splitlines()
    for name in ("fit", "validate", *COMMANDS):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert len(OPTIONS) == 20
    for option in OPTIONS:
        assert option in short_help("fit")
        name = option.split()[0].removeprefix("--")
        assert name in option_names() or ".init_args." in name


@pytest.mark.parametrize("words", [[], ["fit", "--help"], ["fit", "--lr", "3"], ["ft"], ["merge", "--bass", "x"]])
def test_torch_is_not_imported_for_it(words: list[str]) -> None:
    program = (
        f"import sys; sys.argv = ['pipelite', *{words}]\nfrom lightning_pipelite.cli.main import main\n"
        "try: main()\nfinally: print([name for name in ('torch', 'transformers', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize("given", [["--model_dir", "d"], ["--model_dir=d"], ["--base", "d"], ["--base=d"]])
@pytest.mark.parametrize(
    ("command", "own"),
    [("fit", "--model.model_dir"), ("validate", "--model.model_dir"), ("preview", "--model.model_dir"),
     ("plan", "--model_dir"), ("convert", "--model.model_dir"), ("check", None)]
    + [(name, "--base") for name in ("merge", "generate", "export-gguf", "control-to-lora", "analyze")],
)  # fmt: skip
def test_the_base_has_one_name_in_all_commands(command: str, own: str | None, given: list[str]) -> None:
    words = with_own_names(command, ["--x", "1", *given, "--y"])
    base = ["d"] if own is None else [f"{own}=d"] if len(given) == 1 else [own, "d"]
    assert words == ["--x", "1", *base, "--y"]
    with pytest.raises(ConfigurationError, match="--base and --model_dir are the same option; give only one of them"):
        with_own_names(command, ["--base", "a", "--model_dir", "b"])


def test_a_command_without_a_base_has_no_name_for_it() -> None:
    assert with_own_names("migrate", ["a.toml", "--model_dir", "b"]) == ["a.toml", "--model_dir", "b"]


def test_values_are_those_of_the_classes(config: str) -> None:
    wanted = {"model.dtype", "model.activation_memory", "model.schedule", "model.attn_implementation", "data.packing"}
    assert {*choices()} == {*wanted, "data.long_conversations"}
    for name, words in choices().items():
        for word in (*words, "null"):
            check_early(["--config", config, f"--{name}={word}"] if word else ["--config", config])
    for null in ("Null", "NULL", "~"):  # YAML's other spellings
        check_early(["--config", config, f"--data.packing={null}"])


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("merge", ["--base=meta-llama/X"], "hf download meta-llama/X --local-dir models/X, and give models/X"),
        ("generate", ["--model_dir", "meta-llama/X"], "hf download meta-llama/X --local-dir models/X"),
        ("plan", ["--config", "x", "--model_dir", "meta-llama/X"], "hf download meta-llama/X --local-dir models/X"),
        ("analyze", ["--adapter", "me/lora"], "--adapter: me/lora is not a directory. .* --local-dir adapters/lora"),
    ],
)
def test_names_of_the_hub(command: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_command(command, COMMANDS[command], with_own_names(command, words))


def test_options_of_chosen_classes() -> None:
    for key, name, meant in (
        ("trainer.strategy", "pipeline_stagess", "pipeline_stages"),
        ("model.adapter", "drop_out", "dropout"),
    ):
        message = f"Parser key \"{key}\":\n  Option '{name}' is not accepted"
        assert explain(message, {}) == f"{key}.{name} is not an option; did you mean {key}.init_args.{meant}?"
