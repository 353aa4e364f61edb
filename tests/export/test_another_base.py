"""An adapter that was trained on another base than the given one is refused, unless explicitly allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export_cases import write_adapter, write_base, write_control_adapter
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import analyze, export_gguf, merge
from lightning_pipelite.models.fingerprint import fingerprint, record_base, refuse_another_base


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """Return two models that differ only in their weights, like a model and its fine-tuned version."""
    one = write_base(tmp_path / "one", "llama")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    weights = {name: tensor + 0.5 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return one, other


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def commands(adapter: Path, base: Path, output: Path, **options: Any) -> dict[str, Any]:
    return {
        "merge": lambda: merge(str(base), str(adapter), f"{output}-merged", **options),
        "export-gguf": lambda: export_gguf(str(adapter), str(base), f"{output}.gguf", **options),
        "analyze": lambda: analyze(str(adapter), str(base), f"{output}-analysis", **options),
    }


def refused(adapter: Path, base: Path, output: Path, commands_of: tuple[str, ...] = ()) -> None:
    for name, command in commands(adapter, base, output).items():
        if not commands_of or name in commands_of:
            with pytest.raises(ConfigurationError, match=r"was trained on another base .*allow_another_base to true"):
                command()


def run_all(adapter: Path, base: Path, output: Path, **options: Any) -> None:
    for command in commands(adapter, base, output, **options).values():
        command()


def test_the_base_that_the_configuration_names(bases: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = bases
    adapter = write_adapter(tmp_path / "adapter", one, target_modules=["q_proj"])  # PEFT records the base's directory
    run_all(adapter, one, tmp_path / "same")
    refused(adapter, other, tmp_path / "refused")
    assert not list(tmp_path.glob("refused*"))
    run_all(adapter, other, tmp_path / "asked", allow_another_base=True)
    analyze(str(adapter), None, str(tmp_path / "without"))
    copied = Path(shutil.copytree(one, tmp_path / "copied"))
    run_all(adapter, copied, tmp_path / "copy")
    (one / "model.safetensors").unlink()  # nothing is left to compare with
    run_all(adapter, other, tmp_path / "gone")


def test_what_tells_nothing_of_the_base(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """A base is accepted if the recorded one is damaged, or if the recorded name is not a usable name."""
    one, other = bases
    adapter = write_adapter(tmp_path / "adapter", one, target_modules=["q_proj"])
    (one / "model.safetensors").write_bytes(b"damaged")
    refuse_another_base(adapter, other)
    for name in (5, "", None, [str(other)]):
        change(adapter / "adapter_config.json", base_model_name_or_path=name)
        refuse_another_base(adapter, other)


def test_the_fingerprint_beside_it_counts_more(bases: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = bases
    adapter = write_adapter(tmp_path / "adapter", one, target_modules=["q_proj"])
    record_base(adapter, fingerprint(other))
    shutil.rmtree(one)
    run_all(adapter, other, tmp_path / "same")
    refused(adapter, write_base(tmp_path / "third", "qwen3"), tmp_path / "refused")


def test_control_adapters_too(bases: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = bases
    control = write_control_adapter(tmp_path / "control")
    record_base(control, fingerprint(one))
    analyze(str(control), str(one), str(tmp_path / "same"))
    refused(control, other, tmp_path / "refused", ("export-gguf", "analyze"))
