"""Builds and loads the text part of a model with images or sound.

Either transformers has it as a causal LM of its own, and a tiny one, loaded from what the tiny whole model saves, gives
the same logits. Or it is the whole model's own class, built without its towers: masks, positions and the processing of
logits are then its own code, and names are those of the whole checkpoint. Modules that are left out raise an error if
they are called, which the trial of a tiny model reveals.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from typing_extensions import override

from lightning_pipelite.models.probe import build_tiny, equal
from lightning_pipelite.models.transformers_compat import (
    class_of,
    mark_initialised,
    no_init_weights,
    revert_weight_conversion,
)

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)  # tried in order

# Prefixes, in old and new multimodal checkpoints, of the weights of a text model that is a causal LM of its own.
TEXT_MODEL_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.(?!model\.)": "model.",
    r"^model\.text_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


class LeftOut(nn.Module):
    """Stands in for an encoder of images or sound; some classes read its device before they see that there are none."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is not registered as a submodule

    @property
    def device(self) -> torch.device:
        """The device of the rest of the model."""
        return self._model[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rest of the model."""
        return self._model[0].dtype

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("its text model requires encoded images or sound")


def auto_class(whole: PretrainedConfig, config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Return the class that builds and loads a causal LM (``from_config``, ``from_pretrained``); None if none does.

    Args:
        whole: Configuration of the directory.
        config: Configuration of the causal LM: ``whole``, or a part of it.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        Exception: Whatever the whole model's class raises if its text part cannot be built; a ValueError if tokens of
            the text part see later ones.
    """
    brought = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal_class = class_of(AutoModelForCausalLM, config)
    if brought or (causal_class is not None and config is whole):
        return AutoModelForCausalLM
    part_class: Any = text_part_class(whole)
    if causal_class is None or part_class is None:
        return part_class
    try:
        reference = build_tiny(config, part_class.from_config)
    except Exception:
        if class_of(AutoModelForCausalLM, whole) is not None:  # transformers itself loads it as a causal LM
            return AutoModelForCausalLM
        raise
    if _sees_the_future(reference):  # depends on how it attends, among other things
        raise ValueError("its tokens attend to later tokens")
    return AutoModelForCausalLM if _does_the_same(causal_class, reference) else part_class


_INPUT_IDS = torch.randint(20, 120, (1, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _sees_the_future(model: PreTrainedModel) -> bool:
    changed = _INPUT_IDS.clone()
    changed[:, -1] += 1
    logits = [model.eval()(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (_INPUT_IDS, changed)]
    return not equal(*logits)


@torch.no_grad()
def _does_the_same(causal_class: Any, reference: PreTrainedModel) -> bool:
    """Return whether a standalone text model, loaded from what ``reference`` saves, gives the same logits."""
    try:
        model = causal_class.from_pretrained(
            None,
            config=copy.deepcopy(reference.config.get_text_config(decoder=True)),
            state_dict=revert_weight_conversion(reference, reference.state_dict()),
            dtype=torch.float32,
            key_mapping=TEXT_MODEL_NAMES,
        )
        logits = [each.eval()(input_ids=_INPUT_IDS, use_cache=False).logits for each in (model, reference)]
    except Exception:  # names or sizes that do not fit
        return False
    return equal(*logits)


def text_part_class(whole: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return a class that builds the text part of models of ``whole``, or None if no auto class knows them.

    It accepts the text model's configuration as well as the whole one, and has ``from_config`` as auto classes do.
    """
    classes = filter(None, (class_of(auto, whole) for auto in AUTO_CLASSES))
    text = whole.get_text_config(decoder=True)
    whole_class = next((each for each in classes if text is whole or each.config_class is not type(text)), None)
    if whole_class is None or (text is whole and not whole_class.__name__.endswith("ForCausalLM")):
        return None

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, type(whole)):
            config = _around(config, whole)
        with torch.device("meta"), no_init_weights():  # what is left out takes neither time nor memory
            whole_class.__init__(self, config, *args, **kwargs)
        _leave_out_towers(self)
        self.post_init()

    def from_config(config: PretrainedConfig, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
        return made._from_config(copy.deepcopy(config), **kwargs)

    # Name and module stay: transformers uses them to look up how weights are renamed.
    members = {"__init__": build, "__module__": whole_class.__module__, "from_config": staticmethod(from_config)}
    made: Any = type(whole_class.__name__, (whole_class,), members)
    return made


def _around(text: PretrainedConfig, whole: PretrainedConfig) -> PretrainedConfig:
    """Return ``whole`` with ``text`` in place of its text model's configuration."""
    made = copy.copy(whole)
    inside = whole.get_text_config(decoder=True)
    names = [name for name in whole.sub_configs if getattr(whole, name, None) is inside]
    if not names:
        raise ValueError("its text model has no configuration of its own")
    for name in whole.sub_configs:
        setattr(made, name, text if name in names else copy.deepcopy(getattr(whole, name, None)))
    return made


def _leave_out_towers(model: PreTrainedModel) -> None:
    """Keep only modules without weights, and the text model and head, rebuilt on the current default device."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or type(head) is not nn.Linear:
        raise ValueError("it has no embedding, or its head is not a plain linear layer")
    inside = [
        (name, each)
        for name, each in model.named_modules()
        if name and isinstance(each, PreTrainedModel) and any(module is embedding for module in each.modules())
    ]
    if not inside:
        raise ValueError("its text model is not a separate PreTrainedModel")
    path, text = inside[-1]  # the innermost
    kept = {id(parameter) for parameter in (*text.parameters(), *head.parameters())}  # modules may be shared
    towers: list[str] = []
    for name, child in model.named_modules():
        own = [id(parameter) for parameter in child.parameters()]
        if own and kept.isdisjoint(own) and not name.startswith(tuple(f"{tower}." for tower in towers)):
            towers.append(name)
    for name in towers:
        _put(model, name, LeftOut(model))
    for name, module in model.named_modules():
        if not name or path.startswith(f"{name}."):  # what images need, such as the end-of-row embedding
            for held in (module._parameters, module._buffers):
                held.update(dict.fromkeys(held))
            mark_initialised(module)
    _put(model, path, type(text)(text.config))
    head_name = next(name for name, module in model.named_modules() if module is head)
    _put(model, head_name, nn.Linear(head.in_features, head.out_features, bias=head.bias is not None))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
