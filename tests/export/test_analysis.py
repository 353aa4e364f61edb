"""Figures computed from the factors, against those of full matrices, and the files that are written."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from export_cases import FUSED, write_adapter, write_base, write_control_adapter
from lightning_pipelite.adapters.control_files import Transform
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export import analyze
from lightning_pipelite.export.lora_files import Factors
from lightning_pipelite.export.spectra import control, product


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 24, 5), (24, 40, 5), (12, 12, 12)])
def test_a_loras_figures_are_those_of_the_full_product(shape: tuple[int, int, int]) -> None:
    rows, columns, rank = shape
    a, b = _random(rank, columns), _random(rows, rank, seed=1)
    found = product(Factors(a, b, -0.7, False), base_norm=3.0)
    values = torch.linalg.svdvals((0.7 * b @ a).double())[:rank]
    assert found.singular_values == pytest.approx(values.tolist(), rel=1e-5)
    assert found.frobenius == pytest.approx(float((0.7 * b @ a).norm()), rel=1e-5)
    assert found.spectral == pytest.approx(float(values[0]), rel=1e-5)
    assert found.effective_rank == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-5)
    assert found.relative == pytest.approx(found.frobenius / 3.0)


def test_experts_are_taken_together() -> None:
    a, b = _random(3, 2, 16), _random(3, 24, 2, seed=1)
    found = product(Factors(a, b, 0.5, False))
    each = [torch.linalg.svdvals((0.5 * y @ x).double())[:2] for x, y in zip(a, b, strict=True)]
    assert found.frobenius == pytest.approx(float((0.5 * b @ a).norm()), rel=1e-5)
    assert found.spectral == pytest.approx(max(float(values[0]) for values in each), rel=1e-5)
    assert found.singular_values == pytest.approx(torch.stack(each).mean(0).tolist(), rel=1e-5)
    assert product(Factors(torch.zeros_like(a), b, 0.5, False)).effective_rank == 0.0


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_control_adapters_figures_are_those_of_the_full_matrix(orthogonal: bool) -> None:
    q, s = torch.linalg.qr(_random(40, 6))[0], 0.4 * _random(6, seed=1)
    q = q if orthogonal else q + 0.05 * _random(40, 6, seed=2)
    found = control(Transform(q, q.mT, s))
    q64, scales = q.double(), torch.expm1(s.double())
    whole = q64 @ torch.diag(scales) @ q64.T
    values = torch.linalg.svdvals(whole)[:6]
    eigenvalues = torch.linalg.eigvalsh(whole)
    assert found.frobenius == pytest.approx(float(whole.norm()), rel=1e-5)
    assert found.spectral == pytest.approx(float(values[0]), rel=1e-5)
    assert found.nuclear == pytest.approx(float(values.sum()), rel=1e-5)
    assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-4)
    assert found.effective_rank == pytest.approx(float(values.sum() ** 2 / whole.square().sum()), rel=1e-5)
    assert found.orthogonality == pytest.approx(float((q64.T @ q64 - torch.eye(6)).square().sum()), rel=1e-5, abs=1e-12)
    nonzero = sorted(eigenvalues.tolist(), key=abs)[-6:]
    assert found.eigenvalues == pytest.approx(sorted(nonzero, reverse=True), rel=1e-5, abs=1e-6)
    backwards = torch.linalg.eigvalsh(q64 @ torch.diag(torch.expm1(-s.double())) @ q64.T).tolist()
    assert found.eigenvalues_inverse == pytest.approx(sorted(sorted(backwards, key=abs)[-6:], reverse=True), rel=1e-5)
    assert found.spectral_approximated == pytest.approx(float(scales.abs().max()), rel=1e-5)
    assert found.spectral_error == pytest.approx(float(scales.abs().max() / values[0] - 1), abs=1e-6)
    assert found.nuclear_error == pytest.approx(float(scales.abs().sum() / values.sum() - 1), abs=1e-6)
    assert (abs(found.nuclear_error or 0) < 1e-5) == orthogonal


def _check_written(directory: Path, pictures: set[str]) -> dict[str, dict[str, float]]:
    assert {path.name for path in directory.iterdir()} == {"analysis.html", "analysis.json", *pictures}
    for name in pictures:
        with Image.open(directory / name) as image:
            assert image.format == "PNG"
            assert image.width >= 1200
            assert image.convert("L").getextrema()[0] < 100
    page = (directory / "analysis.html").read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/png;base64,', page)) == len(pictures)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    content = json.loads((directory / "analysis.json").read_text())
    figures: dict[str, dict[str, float]] = content["figures"]
    return figures


def test_a_lora_with_and_without_its_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules="all-linear", rank_pattern={"v_proj": 2})
    told = analyze(str(adapter))
    without = _check_written(tmp_path / "adapter-analysis", {"norms.png", "effective_ranks.png", "spectra.png"})
    assert len(told.splitlines()) > len(without) == 28
    analyze(str(adapter), str(base), str(tmp_path / "out"))
    pictures = {"norms.png", "relative_norms.png", "effective_ranks.png", "spectra.png"}
    figures = _check_written(tmp_path / "out", pictures)
    lora, weights = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name, each in figures.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = lora[f"{key}A.weight"], lora[f"{key}B.weight"]
        added = float((8 / len(a) * b @ a).norm())
        assert each["frobenius"] == pytest.approx(added, rel=1e-5)
        assert each["relative"] == pytest.approx(added / float(weights[name].norm()), rel=1e-5)
        assert without[name.removesuffix(".weight")]["frobenius"] == pytest.approx(added, rel=1e-5)


def test_fused_experts_with_and_without_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "mixtral")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=FUSED)
    analyze(str(adapter), output=str(tmp_path / "without"))
    analyze(str(adapter), str(base), str(tmp_path / "with"))
    found = [json.loads((tmp_path / each / "analysis.json").read_text())["figures"] for each in ("without", "with")]
    norms = [sorted(each["frobenius"] for each in figures.values()) for figures in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert "model.layers.0.mlp.experts.gate_up_proj" in found[1]


def test_a_control_adapter(tmp_path: Path) -> None:
    adapter = write_control_adapter(tmp_path / "adapter", rank=5)
    told = analyze(str(adapter), str(write_base(tmp_path / "base", "llama")), str(tmp_path / "out"))
    figures = _check_written(tmp_path / "out", {"norms.png", "eigenvalues.png", "conditioning.png"})
    assert list(figures) == ["0", "1", "2", "3"]
    scales = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.layers.2.control_S"]
    assert figures["2"]["spectral"] == pytest.approx(float(torch.expm1(scales).abs().max()), rel=1e-5)
    assert "λ max" in told


def test_an_untrained_adapter_and_a_broken_one(tmp_path: Path) -> None:
    adapter = write_control_adapter(tmp_path / "adapter", size=0.0)
    analyze(str(adapter))
    figures = json.loads((tmp_path / "adapter-analysis" / "analysis.json").read_text())["figures"]
    assert figures["0"]["condition"] is None
    assert figures["0"]["effective_rank"] == 0.0
    base = write_base(tmp_path / "base", "llama")
    lora = write_adapter(tmp_path / "lora", base, target_modules=["q_proj"])
    tensors = load_file(lora / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=r"lacks .*layers\.0\.self_attn\.q_proj\.lora_"):
        analyze(str(lora))
    with pytest.raises(ConfigurationError, match=r"has no adapter_config\.json|does not exist"):
        analyze(str(tmp_path / "nowhere"))
    assert math.isfinite(figures["0"]["orthogonality"])
