"""Every code block of the README, every configuration and every example runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quickstart
from command_jobs import run_command
from processes import Workers

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
MODES = ["lora", "qlora", "full", "control_adapter", "continued_pretraining", "qlora_four_gpus"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a user's directory: the quickstart's texts and its random model, under the README's names."""
    made = tmp_path_factory.mktemp("user")
    quickstart.write_texts(made)
    (made / "models").mkdir()
    quickstart.make_base_model(made).rename(made / "models" / "base")
    for path in sorted((made / "texts" / "reference").glob("*.txt"))[:5]:
        path.rename(made / "texts" / path.name)
    for kind, folder in (("positive", "library"), ("negative", "reference")):
        (made / kind).mkdir()
        for path in sorted((made / "texts" / folder).glob("*.txt"))[:6]:
            shutil.copy(path, made / kind)
    return made


def run_blocks(directory: str, blocks: list[str]) -> None:
    """Run Python blocks in order in a directory, as one program."""
    import os

    os.chdir(directory)
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_python_blocks_run(workers: Workers, directory: Path) -> None:
    assert len(PYTHON) == 3
    workers.run(1, run_blocks, str(directory), PYTHON)
    assert (directory / "output" / "adapter" / "adapter_model.safetensors").is_file()


def test_readme_command_runs(workers: Workers, directory: Path) -> None:
    (command,) = [code for language, code in BLOCKS if language == "bash"]
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "pipelite"
    index = arguments.index("--config") + 1
    arguments[index] = str(ROOT / arguments[index])
    extra = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--model.dtype=float32"]
    workers.run(2, run_command, str(directory), [*arguments, *extra])
    assert (directory / "output" / "lora" / "adapter_model.safetensors").is_file()


def test_readme_data_options_pack(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (block,) = [code for language, code in BLOCKS if language == "yaml"]
    talks = [
        {"messages": [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"Python {n}."}]}
        for n in range(2000)
    ]
    (directory / "more").mkdir()
    (directory / "more" / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks) + "no record\n")
    (directory / "more" / "held.jsonl").write_text(json.dumps({"text": "held out"}))
    (directory / "chat").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "chat" / name).write_bytes((directory / "models" / "base" / name).read_bytes())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (directory / "chat" / "chat_template.jinja").write_text(template)
    (directory / "data.yaml").write_text(f"{block}\nmodel:\n  model_dir: chat\n")
    monkeypatch.chdir(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    run_command(str(directory), ["preview", "--config", "data.yaml"])
    printed = capsys.readouterr().out
    assert "1 bad record skipped (the first: " in printed
    assert "eval held: 1 document," in printed
    assert len(re.findall(r"^sequence \d: ", printed, re.MULTILINE)) == 3


@pytest.mark.parametrize("mode", MODES)
def test_configurations_train(workers: Workers, directory: Path, mode: str) -> None:
    arguments = [
        "fit", "--config", str(ROOT / "configs" / f"{mode}.yaml"), "--trainer.devices=1", "--trainer.max_steps=2",
        "--trainer.accumulate_grad_batches=2", "--trainer.limit_val_batches=1", "--data.sequence_len=128",
        "--overwrite",  # the README's command has already trained there
    ]  # fmt: skip
    if mode == "continued_pretraining":
        arguments.append("--model.warmup_steps=1")
    if mode == "qlora_four_gpus":  # the tiny model has four layers: one for each of its four stages
        arguments[arguments.index("--trainer.devices=1")] = "--trainer.devices=4"
    workers.run(4 if mode == "qlora_four_gpus" else 1, run_command, str(directory), arguments)
    name = "model.safetensors.index.json" if mode in ("full", "continued_pretraining") else "adapter_model.safetensors"
    assert (directory / "output" / mode / name).is_file()


def test_every_configuration_is_run_by_a_test() -> None:
    quickstarts = {"quickstart", "quickstart_base"}  # run by test_the_quickstart
    assert {path.stem for path in (ROOT / "configs").iterdir()} == {*MODES, *quickstarts}
    # callbacks_ddp: tests/callbacks; compare_llama_cpp: tests/export; control_style and the others: test_examples.
    examples = {"quickstart.py", "drop_in.py", "callbacks_ddp.py", "compare_llama_cpp.py", "control_style.py"}
    others = {"what_was_learned.ipynb", "torchrun.sh", "slurm.sbatch"}
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == examples | others


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart(tmp_path: Path) -> None:
    """Run the quickstart with only a few steps of each training; it can be run again."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("of an earlier one")
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path), "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (float(value) for value in re.findall(r"evaluation loss \w+ training:\s+([\d.]+)", done.stdout))
    assert after < before
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert "tensorboard --logdir" in done.stdout
    # No library output: transformers imports DeepSpeed while it saves, which logs its accelerator.
    assert "[WARNING]" not in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith("training (")] == []
