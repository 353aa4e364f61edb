"""Runs a layer on each packed document by itself where its code would let one see the next.

Linear attention, state-space models and short convolutions carry a state from token to token. Kernels for them can be
told where documents begin, but a class may have no kernel, or pass this on to some of its operations only, or pass it
over where the kernel is not installed. Documents that are rows of their own are apart whatever computes the layer:
transformers' own code, or the kernels of flash-linear-attention, mamba-ssm and causal-conv1d where it uses them.

Which layers need it is found out by a trial (:func:`leaking_modules`), and that it is enough by another: see
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
    """Let the named modules of ``model`` run on each document by itself."""
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
        # The meta device has no lengths. What is planned there takes the documents as one, as if none were padded.
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
    """Return the outermost modules inside of a layer whose later tokens change with the first document's.

    The layer itself, if it leaks and nothing inside of it does so by itself.

    Args:
        calls: What the modules were called with on packed documents, by name.
        model: They are called again, so in a context that tells of the documents.
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
