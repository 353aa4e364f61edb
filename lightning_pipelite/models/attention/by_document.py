"""Runs a layer on each packed document separately if its code would leak one document into the next.

Linear attention, state-space models and short convolutions carry a state from token to token. Their kernels accept the
documents' bounds, but a class may have no kernel, pass the bounds to only some of its operations, or ignore them if the
kernel is not installed. Documents in rows of their own stay apart whatever computes the layer: transformers' own code,
or the kernels of flash-linear-attention, mamba-ssm and causal-conv1d that it uses.

One trial finds the layers that need this (:func:`leaking_modules`), another shows that it is enough: see
``Probe.isolate_documents``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.models.attention.document_mask import current_documents, each_row_a_document
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in, take_out

Call = tuple[tuple[Any, ...], dict[str, Any]]


def run_by_document(model: nn.Module, names: Iterable[str]) -> None:
    """Make the named modules of ``model`` run on each document separately."""
    for name in names:
        mix_in(model.get_submodule(name), _ByDocument)


def run_as_it_is(model: nn.Module, names: Iterable[str]) -> None:
    """Undo :func:`run_by_document`."""
    for name in names:
        take_out(model.get_submodule(name), _ByDocument)


class _ByDocument(Mixin):
    """Mixed into a layer, or a part of it, that carries a state from token to token."""

    mixin_place = MixinPlace.COMPUTATION

    @torch.compiler.disable  # how often it runs, and on what, depends on the lengths
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        documents = current_documents()
        # There are no lengths on the meta device: a plan treats the documents as one, without padding.
        if documents is None or documents.bounds.is_meta:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        batches = documents.batches
        outputs = []
        for place in batches.places:
            own_args, own_kwargs = batches.deal(args, place), batches.deal(kwargs, place)
            with each_row_a_document():
                outputs.append(super().forward(*own_args, **own_kwargs))  # type: ignore[misc]
        return batches.gather(outputs)


def leaking_modules(calls: dict[str, Call], model: nn.Module, layer_name: str, first: int) -> list[str]:
    """Return the outermost modules inside a layer whose output for later documents depends on the first document.

    If the layer leaks but no module inside it does so on its own, this is the layer itself.

    Args:
        calls: The modules' arguments on packed documents, by name.
        model: Holds the modules, which are called again: call this inside
            :func:`~lightning_pipelite.models.attention.document_mask.document_mask`.
        layer_name: The layer.
        first: How many tokens the first document has.
    """
    found: list[str] = []
    pending = [name for name, _ in _children(model, layer_name)]
    while pending:
        name = pending.pop(0)
        if name not in calls:
            pending += [child for child, _ in _children(model, name)]
        elif _leaks(model.get_submodule(name), calls[name], first):
            found.append(name)
    if not found and layer_name in calls and _leaks(model.get_submodule(layer_name), calls[layer_name], first):
        return [layer_name]
    return found


def _children(model: nn.Module, name: str) -> Sequence[tuple[str, nn.Module]]:
    return [(f"{name}.{child}", module) for child, module in model.get_submodule(name).named_children()]


def _leaks(module: nn.Module, call: Call, first: int) -> bool:
    args, kwargs = call
    hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if hidden is None or not hidden.is_floating_point() or hidden.ndim < 3:
        return False
    other = hidden.clone()
    other[:, :first] = other[:, :first].roll(1, dims=-1) + 1

    def run(given: Tensor) -> Tensor:
        swapped = [given if value is hidden else value for value in args]
        output = module(*swapped, **{name: given if value is hidden else value for name, value in kwargs.items()})
        output = output[0] if isinstance(output, tuple) else output
        return (
            output[:, first:] if isinstance(output, Tensor) and output.shape[:2] == hidden.shape[:2] else given[:, :0]
        )

    before, after = run(hidden), run(other)
    return before.shape == after.shape and not torch.allclose(before, after, rtol=1e-5, atol=1e-6)
