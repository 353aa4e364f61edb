"""Analyses what an adapter has learned, in figures and plots."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from lightning_pipelite.adapters.control_files import ControlAdapterFile, is_control_adapter
from lightning_pipelite.adapters.lora_kinds import rest_of
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.export.atomic_output import new_directory
from lightning_pipelite.export.base import BaseModel
from lightning_pipelite.export.control_lora import layers_of
from lightning_pipelite.export.lora_files import LoRAOfBase
from lightning_pipelite.export.page import page
from lightning_pipelite.export.pictures import control_pictures, lora_pictures, place
from lightning_pipelite.export.spectra import Control, Product, control, product, saved_factors
from lightning_pipelite.models.fingerprint import refuse_another_base
from lightning_pipelite.shared.progress import track

DPI = 200
LORA_TERMS = {
    "‖ΔW‖_F": "Frobenius norm of ΔW = scaling · B A; for fused experts, of all of them together.",
    "‖ΔW‖₂": "Spectral norm, the largest singular value.",
    "rank": "Number of singular values.",
    "eff. rank": "Effective rank ‖ΔW‖²_* / ‖ΔW‖²_F: how many directions ΔW uses, between 1 and its rank.",
    "‖ΔW‖/‖W‖": "Frobenius norm relative to that of the base's weight; needs --base.",
}
CONTROL_TERMS = {
    "‖QᵀQ-I‖²": "Squared Frobenius norm of QᵀQ - I: 0 if the directions are orthonormal.",
    "‖W‖_F": "Frobenius norm of W = Q diag(λ) Qᵀ, λ = expm1(S).",
    "‖W‖₂": "Spectral norm; in brackets, the error of max |λ| as an approximation of it.",
    "‖W‖_*": "Nuclear norm; in brackets, the error of Σ |λ| as an approximation of it.",
    "eff. rank": "Effective rank ‖W‖²_* / ‖W‖²_F, between 1 and the rank.",
    "κ": "Condition number of W within its rank: largest over smallest singular value.",
    "λ min": "Smallest eigenvalue of W for class +1.",
    "λ max": "Largest eigenvalue of W for class +1.",
}
CAPTIONS = {
    "norms": "Norms by layer.",
    "relative_norms": "Norm of what is added to each weight, relative to the norm of the weight.",
    "effective_ranks": "Effective rank of what is added to each weight.",
    "spectra": "Singular values of what is added to each weight, one line per layer.",
    "eigenvalues": "Eigenvalues of W: by layer for both classes, and in descending order for class +1.",
    "conditioning": "Conditioning of each layer.",
}


def analyze(
    adapter: str,
    base: str | None = None,
    output: str | None = None,
    trust_remote_code: bool = False,
    allow_another_base: bool = False,
) -> str:
    """Print and plot the figures of a LoRA or a Control Adapter.

    Writes ``analysis.json``, one PNG per plot, and a self-contained ``analysis.html`` with all of them. Everything is
    computed from the small factors. Only the products B·A of a LoRA are analysed; anything else in it, such as the
    magnitudes of a DoRA, is listed as not shown.

    Args:
        adapter: Directory of the adapter.
        base: Directory of the model that it was trained on (also ``--model_dir``); adds norms relative to those of the
            base's weights.
        output: Directory to write; must be empty or not exist. Defaults to the adapter's name with "-analysis" added.
        trust_remote_code: Run the base's own Python code, if it has any.
        allow_another_base: Continue with a base that the adapter was not trained on.
    """
    source = Path(adapter)
    target = Path(output) if output is not None else source.resolve().with_name(f"{source.resolve().name}-analysis")
    rest: list[str] = []
    with new_directory(target, [source, *([Path(base)] if base else [])]) as partial:
        model = BaseModel(base, trust_remote_code=trust_remote_code) if base else None
        is_control = is_control_adapter(source)
        if model and not allow_another_base:
            refuse_another_base(source, model.directory)
        if is_control:
            layers = _control(source, model)
            head, rows, terms = ["layer", *CONTROL_TERMS], _control_rows(layers), CONTROL_TERMS
            pictures = control_pictures(layers)
            figures: Mapping[str, object] = {str(number): asdict(each) for number, each in layers.items()}
            kind = "Control Adapter"
        else:
            products, rest = _lora(source, model)
            terms = {name: text for name, text in LORA_TERMS.items() if base or "‖W‖" not in name}
            head, rows = ["layer", "module", *terms], _lora_rows(products, relative=base is not None)
            pictures = lora_pictures(products)
            figures, kind = {name: asdict(each) for name, each in products.items()}, "LoRA"
        pngs = {name: (_png(figure), CAPTIONS[name]) for name, figure in pictures.items()}
        for name, (png, _) in pngs.items():
            (partial / f"{name}.png").write_bytes(png)
        content = json.dumps({"kind": kind, "figures": figures}, indent=1, allow_nan=False)
        (partial / "analysis.json").write_text(content + "\n", encoding="utf-8")
        about = f"{kind} in {source}" + (f", on {base}" if base else "")
        if rest:
            about += f"; not shown: {', '.join(rest)}"
        text = page(f"Analysis of {source.name}", about, pngs, head, rows, terms)
        (partial / "analysis.html").write_text(text, encoding="utf-8")
    written = ", ".join(["analysis.html", "analysis.json", *(f"{name}.png" for name in pngs)])
    return f"{about}\n\n{_table(head, rows)}\n\n{target}: {written}"


def _lora(adapter: Path, model: BaseModel | None) -> tuple[dict[str, Product], list[str]]:
    """Return the figures of each product, and a list of what else the adapter contains."""
    if model is None:
        factors, rest = saved_factors(adapter)
        return {name: product(each) for name, each in track(list(factors.items()), "analysing", "modules")}, rest
    lora = LoRAOfBase(model, adapter)
    products = {
        name: product(each, float(model.read_parameter(name).norm()))
        for name, each in track(list(lora.products()), "analysing", "modules")
    }
    return products, rest_of(lora.config, read_tensors(adapter))


def _control(adapter: Path, model: BaseModel | None) -> dict[int, Control]:
    control_file = ControlAdapterFile(adapter)
    if model is not None:
        layers_of(model, control_file)
    return {number: control(each) for number, each in track(control_file.transforms.items(), "analysing", "layers")}


def _lora_rows(products: Mapping[str, Product], *, relative: bool) -> list[list[str]]:
    rows = []
    for name, each in products.items():
        layer, module = place(name)
        row = ["" if layer is None else str(layer), module, f"{each.frobenius:.4g}", f"{each.spectral:.4g}"]
        row += [str(len(each.singular_values)), f"{each.effective_rank:.2f}"]
        rows.append([*row, f"{each.relative:.3%}"] if relative else row)
    return rows


def _control_rows(layers: Mapping[int, Control]) -> list[list[str]]:
    return [
        [
            str(number),
            "" if each.orthogonality is None else f"{each.orthogonality:.2e}",
            f"{each.frobenius:.4g}",
            f"{each.spectral:.4g}{_bracketed(each.spectral_error)}",
            f"{each.nuclear:.4g}{_bracketed(each.nuclear_error)}",
            f"{each.effective_rank:.2f}",
            "" if each.condition is None else f"{each.condition:.4g}",
            f"{each.eigenvalues[-1]:+.4f}",
            f"{each.eigenvalues[0]:+.4f}",
        ]
        for number, each in layers.items()
    ]


def _bracketed(error: float | None) -> str:
    return "" if error is None else f" ({error:+.2%})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
