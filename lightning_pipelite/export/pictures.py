"""Plots the measured values of an adapter, each plot a matplotlib figure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_pipelite.export.spectra import Control, Product

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "mathtext.fontset": "cm",
}
COLOURS = "viridis"
WIDTH = 6.75  # inches: text width of a two-column page
FLOW = ("q_proj", "k_proj", "v_proj", "qkv", "o_proj", "dense", "gate_proj", "up_proj", "gate_up", "down_proj")
SHORT = {"self_attn.": "", "mlp.": "", ".weight": "", "attention.": "", "attn.": ""}


def lora_pictures(products: Mapping[str, Product]) -> dict[str, Figure]:
    """Return the plots of a LoRA by name: norms, effective ranks and spectra, by layer and module."""
    with matplotlib.rc_context(STYLE):
        pictures = {"norms": _maps(products, r"$\|\Delta W\|_F$", lambda each: each.frobenius)}
        if all(each.relative is not None for each in products.values()):
            title = r"$\|\Delta W\|_F\;/\;\|W\|_F$"
            pictures["relative_norms"] = _maps(products, title, lambda each: each.relative or 0.0)
        pictures["effective_ranks"] = _maps(products, "effective rank", lambda each: each.effective_rank)
        pictures["spectra"] = _spectra(products)
        return pictures


def control_pictures(layers: Mapping[int, Control]) -> dict[str, Figure]:
    """Return the plots of a Control Adapter by name: eigenvalues, norms, and the conditioning of each layer."""
    with matplotlib.rc_context(STYLE):
        pictures = {"eigenvalues": _eigenvalues(layers), "norms": _control_norms(layers)}
        pictures["conditioning"] = _conditioning(layers)
        return pictures


def place(name: str) -> tuple[int | None, str]:
    """Return the number of the layer that a parameter is in, if any, and its shortened name within that layer."""
    match = re.search(r"\.(\d+)\.(.+)$", name)
    layer, short = (int(match[1]), match[2]) if match else (None, name)
    for long, by in SHORT.items():
        short = short.replace(long, by)
    return layer, short


def _in_order(modules: Iterable[str]) -> list[str]:
    """Return the distinct modules in data-flow order, attention before MLP; the rest last, by name."""
    return sorted(
        set(modules), key=lambda name: (next((i for i, e in enumerate(FLOW) if name.startswith(e)), 99), name)
    )


def _maps(products: Mapping[str, Product], title: str, figure_of: Callable[[Product], float]) -> Figure:
    """Draw one value per matrix as a heat map of modules by layers."""
    values = {place(name): figure_of(each) for name, each in products.items()}
    layers = sorted({layer for layer, _ in values if layer is not None})
    modules = _in_order(short for layer, short in values if layer is not None)
    grid = np.full((len(modules), len(layers)), np.nan)
    for (layer, short), value in values.items():
        if layer is not None:
            grid[modules.index(short), layers.index(layer)] = value
    figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * max(len(modules), 2)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap=COLOURS, interpolation="nearest", vmin=0)
    axes.set_yticks(range(len(modules)), modules)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(-0.5, len(layers)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(modules)), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=14)
    bar.set_label(title)
    bar.outline.set_visible(False)
    return figure


def _spectra(products: Mapping[str, Product]) -> Figure:
    """Plot the singular values of each kind of module, one line per layer."""
    places = {name: place(name) for name in products}
    modules = _in_order(short for _, short in places.values())
    columns = min(4, len(modules))
    rows = -(-len(modules) // columns)
    figure = Figure(figsize=(WIDTH, 0.55 + 1.45 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = Normalize(0, max((layer or 0 for layer, _ in places.values()), default=0))
    colours = matplotlib.colormaps[COLOURS]
    for axes, module in zip(grid.flat, modules, strict=False):
        for name, (layer, short) in places.items():
            if short == module:
                values = np.array(products[name].singular_values)
                values[values <= values.max(initial=0.0) * 1e-12] = np.nan
                axes.semilogy(np.arange(1, len(values) + 1), values, color=colours(norm(layer or 0)), linewidth=0.8)
        axes.set_title(module)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < len(modules))
        axes.tick_params(labelbottom=number + columns >= len(modules))
    figure.supxlabel("index $i$", fontsize=9)
    figure.supylabel(r"singular value $\sigma_i$ of $\Delta W$", fontsize=9)
    _layer_bar(figure, grid.ravel().tolist(), norm)
    return figure


def _layer_bar(figure: Figure, axes: Any, norm: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.015, aspect=24)
    bar.set_label("layer")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(6, integer=True)
    bar.update_ticks()


def _eigenvalues(layers: Mapping[int, Control]) -> Figure:
    """Plot the eigenvalues of both classes by layer, and those of class +1 in order, one line per layer."""
    figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
    by_layer, in_order = figure.subplots(1, 2, width_ratios=(1.25, 1), sharey=True)
    numbers = list(layers)
    for each, colour, label, shift in (
        ("eigenvalues", "C0", "class $+1$", -0.18),
        ("eigenvalues_inverse", "C3", "class $-1$", 0.18),
    ):
        points = [(number + shift, value) for number in numbers for value in getattr(layers[number], each)]
        by_layer.scatter(*zip(*points, strict=True), s=4, color=colour, alpha=0.6, linewidths=0, label=label)
    by_layer.set_xlabel("layer")
    by_layer.set_ylabel(r"eigenvalue $\lambda$ of $W$")
    by_layer.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    by_layer.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handletextpad=0.1)
    norm, colours = Normalize(min(numbers), max(numbers)), matplotlib.colormaps[COLOURS]
    for number in numbers:
        values = layers[number].eigenvalues
        in_order.plot(np.arange(1, len(values) + 1), values, color=colours(norm(number)), linewidth=0.8)
    in_order.set_xlabel("index, class $+1$")
    in_order.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in (by_layer, in_order):
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    _layer_bar(figure, in_order, norm)
    return figure


def _control_norms(layers: Mapping[int, Control]) -> Figure:
    """Plot the norms, their approximations for an orthogonal Q, and the errors of these; without Q, ‖W‖_F."""
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    spectral, nuclear, error = figure.subplots(1, 3)
    numbers = list(layers)
    exact = all(each.spectral_approximated is not None for each in layers.values())
    for axes, name, label in ((spectral, "spectral", r"$\|W\|_2$"), (nuclear, "nuclear", r"$\|W\|_*$")):
        axes.plot(numbers, [getattr(layers[n], name) for n in numbers], "o-", markersize=3, label="true")
        if exact:
            values = [getattr(layers[n], f"{name}_approximated") for n in numbers]
            axes.plot(numbers, values, "x", color="C1", markersize=4, label=r"from $\lambda$ alone")
        axes.set_ylim(bottom=0)
        axes.set_title(label)
    handles, labels = spectral.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    if exact:
        for name, label, marker in (("spectral", r"$\|W\|_2$", "o-"), ("nuclear", r"$\|W\|_*$", "s-")):
            values = [100 * (getattr(layers[n], f"{name}_error") or 0.0) for n in numbers]
            error.plot(numbers, values, marker, markersize=3, label=label)
        error.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        error.legend(frameon=False, loc="best")
        error.set_title("approximation error (%)")
    else:
        error.plot(numbers, [layers[n].frobenius for n in numbers], "o-", markersize=3)
        error.set_ylim(bottom=0)
        error.set_title(r"$\|W\|_F$")
    _by_layer(spectral, nuclear, error)
    return figure


def _conditioning(layers: Mapping[int, Control]) -> Figure:
    """Plot how orthogonal Q is, the effective rank, and the condition number."""
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    orthogonality, rank, condition = figure.subplots(1, 3)
    numbers = list(layers)
    if all(each.orthogonality is not None for each in layers.values()):
        values = [layers[n].orthogonality for n in numbers]
        plot = orthogonality.semilogy if all(value and value > 0 for value in values) else orthogonality.plot
        plot(numbers, values, "o-", markersize=3)
        orthogonality.set_title(r"$\|Q^{\mathsf{T}} Q - I\|_F^2$")
    else:
        orthogonality.set_visible(False)
    rank.plot(numbers, [layers[n].effective_rank for n in numbers], "o-", markersize=3)
    full = len(next(iter(layers.values())).eigenvalues)
    rank.axhline(full, color="0.6", linewidth=0.8, linestyle="--")
    rank.text(numbers[-1], full, f"rank {full}", ha="right", va="bottom", fontsize=8, color="0.4")
    rank.set_ylim(0, full * 1.12)
    rank.set_title("effective rank")
    condition.semilogy(numbers, [layers[n].condition or np.nan for n in numbers], "o-", markersize=3)
    condition.set_title(r"condition number $\sigma_1 / \sigma_r$")
    _by_layer(orthogonality, rank, condition)
    return figure


def _by_layer(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
