"""The examples do what they say: each is run, shortened where it is long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import nbformat
import pytest
from nbclient import NotebookClient
from safetensors import safe_open

from ports import free_port
from tiny_job import write_job

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a shell that is not a rank and finds this interpreter's programs and this package."""
    clean = {name: value for name, value in os.environ.items() if name not in RANKS}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return {**clean, "PATH": path, "PYTHONPATH": f"{ROOT}:{EXAMPLES}", "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.mark.slow
def test_a_style_by_control_adapters_to_gguf(tmp_path: Path) -> None:
    base = write_job(tmp_path) / "model"
    command = [sys.executable, str(EXAMPLES / "control_style.py"), str(base), "--output", str(tmp_path / "style")]
    options = ["--steps", "2", "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.dtype=float32"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    written = gguf.GGUFReader(tmp_path / "style" / "style.gguf")
    assert any(float(abs(tensor.data).max()) > 0 for tensor in written.tensors if tensor.name.endswith("lora_b"))
    with safe_open(tmp_path / "style" / "control_adapter" / "adapter_model.safetensors", "pt") as trained:
        assert any(float(trained.get_tensor(name).abs().max()) > 0 for name in trained.keys() if name.endswith("S"))  # noqa: SIM118
    assert (tmp_path / "style" / "lora_inverse" / "adapter_config.json").is_file()
    assert (tmp_path / "style" / "analysis" / "analysis.html").is_file()


@pytest.mark.slow
def test_the_notebook_draws_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(EXAMPLES / "what_was_learned.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # kept without outputs
    (training,) = [cell for cell in notebook.cells if "--trainer.max_steps=12" in cell.source]
    training.source = training.source.replace("max_steps=12", "max_steps=3")
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=200).execute()
    images = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(images) >= 4  # the loss, the bars, and analyze's own


@pytest.mark.timeout(200)
def test_torchrun_over_two_nodes(tmp_path: Path) -> None:
    """Run the script's own command on two "nodes" on this machine, each with one rank."""
    job = write_job(tmp_path)
    arguments, port = fit_arguments(job), str(free_port())
    started = [
        subprocess.Popen(
            ["bash", str(EXAMPLES / "torchrun.sh"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment(NNODES="2", NODE_RANK=str(node), MASTER_ADDR="127.0.0.1",
                                       MASTER_PORT=port, GPUS="1"), cwd=job,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=180)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(told)
    assert (job / "adapter" / "adapter_model.safetensors").is_file()


def test_slurm_starts_a_task_for_each_gpu(tmp_path: Path) -> None:
    """Replace srun by a script that runs the command once for each task, with Slurm's variables."""
    job = write_job(tmp_path)
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(
        '#!/usr/bin/env bash\nfor task in $(seq 0 $((SLURM_NTASKS - 1))); do\n'
        'SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NODEID=$task "$@" & pids+=($!)\ndone\n'
        'for pid in "${pids[@]}"; do wait "$pid" || exit 1; done\n'
    )  # fmt: skip
    srun.chmod(0o755)
    slurm = {
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "29714",
        "SLURM_JOB_NAME": "pipelite", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    variables = environment(**slurm)
    variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), *fit_arguments(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=job, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (job / "adapter" / "adapter_model.safetensors").is_file()


def fit_arguments(job: Path) -> list[str]:
    """Return the arguments for one step of a LoRA in two stages, on CPUs."""
    return [
        "--config", str(ROOT / "configs" / "quickstart.yaml"), "--model.model_dir", str(job / "model"),
        "--data.datasets", f'[{{"dataset_path": "{job}/texts/*.txt"}}]', "--data.sequence_len", "64",
        "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.logger", "false",
    ]  # fmt: skip
