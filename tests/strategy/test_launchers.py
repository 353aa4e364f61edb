"""The example trains the same under every launcher: Lightning's own, torchrun, deepspeed, and two nodes."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ports import free_port
from processes import Workers

pytestmark = pytest.mark.process

EXAMPLE = Path(__file__).parents[2] / "examples" / "drop_in.py"
STEPS = 3
ARGUMENTS = ["--stages", "2", "--steps", str(STEPS), "--devices"]
# Variables that ranks of the worker pool have, and those of a distributed job that runs the tests.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID")


def metrics(output: str) -> dict[str, float]:
    printed = [line for line in output.splitlines() if line.startswith("{'train/loss'")]
    assert len(printed) == 1, output
    found: dict[str, float] = ast.literal_eval(printed[0])
    return found


def in_one_process() -> dict[str, float]:
    """Run the example with a single stage, in a worker."""
    import drop_in

    sys.argv = ["drop_in.py", "--stages", "1", "--devices", "1", "--steps", str(STEPS)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        drop_in.main()
    return metrics(output.getvalue())


@pytest.fixture(scope="module")
def expected(workers: Workers) -> dict[str, float]:
    (found,) = workers.run(1, in_one_process)
    assert found["train/loss"] < 5.4  # it starts at log(256)
    return found


def outputs(command: list[str], environments: list[dict[str, str]]) -> list[str]:
    """Run a command once in each environment, at the same time."""
    clean = {name: value for name, value in os.environ.items() if name not in RANKS}
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        )
        for environment in environments
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(told)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "deepspeed", "nodes"])
def test_the_example_trains_the_same(launcher: str, expected: dict[str, float]) -> None:
    python, script, port = sys.executable, str(EXAMPLE), str(free_port())
    environments: list[dict[str, str]] = [{}]
    command = [python, script, *ARGUMENTS, "2"]
    if launcher == "torchrun":
        command = [python, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", *command[1:]]
    elif launcher == "deepspeed":
        options = ["--no_local_rank", "--num_gpus=2", f"--master_port={port}"]
        command = [python, str(Path(python).with_name("deepspeed")), *options, *command[1:]]
        environments = [{"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}]
    elif launcher == "nodes":
        command[-1] = "1"
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PL_TRAINER_NUM_NODES": "2"}
        environments = [{**shared, "NODE_RANK": rank} for rank in "01"]
    told = outputs(command, environments)
    for output in told:  # `trainer.print` prints once per node
        assert metrics(output) == pytest.approx(expected, abs=2e-4)


def test_launcher_checks_before_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment

    from lightning_pipelite.strategy.launcher import PipeLiteLauncher

    monkeypatch.setenv("LOCAL_RANK", "1")  # launched externally
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    calls: list[Any] = []
    launcher = PipeLiteLauncher(LightningEnvironment(), 2, 1, before_launch=lambda *given: calls.append(given))
    assert launcher.launch(lambda a, b: calls.append((a, b)) or "result", 1, b=2) == "result"
    assert calls == [(None, {"a": 1, "b": 2}), (1, 2)]
    assert launcher.procs == []

    def refuse(*given: Any) -> None:
        raise ValueError("no")

    monkeypatch.delenv("LOCAL_RANK")
    launcher = PipeLiteLauncher(LightningEnvironment(), 2, 1, before_launch=refuse)
    with pytest.raises(ValueError, match="no"):
        launcher.launch(lambda: None)
    assert launcher.procs == []
