"""The whole causal LM without its weights: what the parts are called and whether they can be told apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.checkpoint import read_json
from lightning_pipelite.models.trace import trace_forward

# Kinds of layer that a mask built from the positions keeps inside each document; a recurrent state is not among them.
ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


class Skeleton:
    """A causal LM on the meta device, with the names of the parts that a pipeline deals out.

    No table of models: the decoder layers are the outermost ``ModuleList`` of the configured length, and one forward
    of fake tensors shows what runs before, in and after them.

    Args:
        model_dir: Directory of a Hugging Face causal LM; only ``config.json`` is read.

    Attributes:
        config: The model's configuration, with ``use_cache`` off.
        model: The whole model on the meta device. Tied weights are one and the same parameter in it.
        layers_name: Name of the list of decoder layers, such as ``model.layers``.
        layers: The decoder layers, in order.
        embedding_name: Name of the input embedding, such as ``model.embed_tokens``.
        head_name: Name of the output projection, such as ``lm_head``.
        tail_names: Modules with weights that run after the last decoder layer: final norm and head.
        tied: Whether head and embedding share one weight.
        layers_return_tuple: Whether a decoder layer returns a tuple with the hidden states first.

    Raises:
        ConfigurationError: No readable ``config.json``, not a causal LM that transformers ships, or a model that
            cannot be cut between its decoder layers.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        if not self.model_dir.is_dir():
            raise ConfigurationError(f"{model_dir} is not a directory; model_dir must name a local Hugging Face model.")
        self.config = _read_config(self.model_dir)
        try:
            with torch.device("meta"):
                # bfloat16 as some kernels (grouped matrix products) exist for no other type; only shapes matter here.
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        except Exception as error:
            raise ConfigurationError(
                f"{self.model_dir / 'config.json'} describes no model that can be built: {_first_line(error)}"
            ) from error
        self.config = self.model.config
        self.layers_name, self.layers = self._find_layers()
        self.embedding_name = self._name_of(self.model.get_input_embeddings(), "input embedding")
        self.head_name = self._name_of(self.model.get_output_embeddings(), "output head")
        embedding, head = (self.model.get_submodule(name) for name in (self.embedding_name, self.head_name))
        self.tied = embedding.weight is head.weight
        self.tail_names: list[str] = []
        self.layers_return_tuple = False
        self._trace()
        if self.tied and f"{self.embedding_name}.weight" not in dict(self.model.named_parameters()):
            raise self._refusal(f"its tied weight is called after {self.head_name}, not {self.embedding_name}")

    def layer_of(self, name: str) -> int | None:
        """Return the number of the decoder layer that the module or parameter ``name`` is in, or None."""
        prefix = self.layers_name + "."
        return int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None

    def _find_layers(self) -> tuple[str, list[nn.Module]]:
        count = getattr(self.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        found: dict[str, nn.ModuleList] = {}
        for name, module in self.model.named_modules():
            nested = any(name.startswith(outer + ".") for outer in found)
            if isinstance(module, nn.ModuleList) and len(module) == count > 0 and not nested:
                found[name] = module
        if len(found) != 1:
            raise self._refusal(f"it has {len(found)} lists of {count} decoder layers instead of one")
        ((name, layers),) = found.items()
        return name, list(layers)

    def _name_of(self, module: nn.Module | None, what: str) -> str:
        for name, candidate in self.model.named_modules():
            if module is not None and candidate is module and isinstance(getattr(module, "weight", None), Tensor):
                return name
        raise self._refusal(f"it names no {what}")

    def _trace(self) -> None:
        """Check, by a trial forward, that the model is embedding, layers in order, then the rest."""
        layer_names = [f"{self.layers_name}.{number}" for number in range(len(self.layers))]
        outside = [
            name
            for name, module in self.model.named_modules()
            if self.layer_of(name) is None and any(p is not None for p in module._parameters.values())
        ]
        try:
            trace = trace_forward(self.model, layer_names, outside)
        except Exception as error:
            raise self._refusal(f"a trial forward with position_ids failed: {_first_line(error)}") from error
        order = trace.order
        if [name for name in order if name in layer_names] != layer_names:
            raise self._refusal("its decoder layers do not run once each in order")
        if trace.side_inputs:
            raise self._refusal(f"its decoder layers are also called with {', '.join(sorted(trace.side_inputs))}")
        last = order.index(layer_names[-1])
        self.tail_names = [name for name in outside if name in order[last:] and name not in order[:last]]
        if misplaced := set(outside) - {self.embedding_name, *self.tail_names}:
            raise self._refusal(f"it has weights in {', '.join(sorted(misplaced))} outside embedding, layers and head")
        if (
            self.embedding_name in self.tail_names
            or self.head_name not in self.tail_names
            or len(trace.returns_tuple) != 1
        ):
            raise self._refusal("it does not run as embedding, decoder layers of one kind, and head")
        kinds = set(getattr(self.config.get_text_config(decoder=True), "layer_types", None) or ())
        if not trace.packed_masks == trace.masks > 0 or not kinds <= ATTENTION_KINDS:
            raise self._refusal("it would let packed documents see each other")
        self.layers_return_tuple = trace.returns_tuple.pop()

    def _refusal(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.model_dir}: a model of type {self.config.model_type} cannot be split into pipeline stages because "
            f"{reason}; choose another model."
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_config(model_dir: Path) -> PretrainedConfig:
    path = model_dir / "config.json"
    if not read_json(path).get("model_type"):
        raise ConfigurationError(f"{path} has no model_type; give the directory of a Hugging Face causal LM.")
    try:
        config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here: ValueError, KeyError, validation errors
        raise ConfigurationError(
            f"{path} is no configuration that this version of transformers knows: {_first_line(error)}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping or getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"{path}: model type {config.model_type} is not a causal LM; choose a causal LM.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(
            f"{path} has a quantization_config; give the original model and set load_in_4bit if it shall be quantised."
        )
    config.use_cache = False
    return config
