"""The whole causal LM without its weights: what the parts are called and whether they can be told apart."""

from __future__ import annotations

import itertools
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.attention import varlen
from lightning_pipelite.models.fingerprint import fingerprint
from lightning_pipelite.models.long_documents import try_long_documents
from lightning_pipelite.models.probe import Probe
from lightning_pipelite.models.rope import is_static
from lightning_pipelite.models.router import RouterLoss, find_router_loss
from lightning_pipelite.models.trace import START
from lightning_pipelite.models.transformers_compat import attention_of, set_attention
from lightning_pipelite.models.weight_files import read_json
from lightning_pipelite.models.whole_model import WholeModel, whole_model

NOT_IN_ORDER = "its decoder layers do not run once each in order"


class MetaModel:
    """A causal LM on the meta device, with the names of the parts that a pipeline deals out.

    No table of models: the decoder layers are a ``ModuleList`` whose modules run once each, in order, and a trial of a
    tiny model of the same class shows what runs before, in and after them and what passes between them.

    Args:
        model_dir: Directory of a Hugging Face causal LM; only ``config.json`` is read.
        trust_remote_code: Run the model's own code from ``model_dir``, if it has any.
        attn_implementation: How attention is computed; transformers' choice if not given.

    Attributes:
        config: The model's configuration, with ``use_cache`` off; of a multimodal model, its text model's.
        model: The whole model on the meta device. Tied weights are one and the same parameter in it.
        is_text_part: Whether this is the text model of a multimodal one; images and sound are left out.
        layers_name: Name of the list of decoder layers, such as ``model.layers``.
        layers: The decoder layers, in order.
        embedding_name: Name of the input embedding, such as ``model.embed_tokens``.
        head_name: Name of the output projection, such as ``lm_head``.
        start_names: Modules with weights that run before the first decoder layer, the embedding among them.
        tail_names: Modules with weights that run after the last decoder layer: final norm and head.
        tied: Whether head and embedding share one weight.
        groups: Bounds of the groups of decoder layers that share more than hidden states, and so must share a stage:
            group g has the layers from ``groups[g]`` to ``groups[g + 1]``, exclusive. Mostly one layer each.
        tuple_lengths: For each decoder layer, how many values it returns in a tuple; 0 if it returns none.
        shared_inputs: Names of linear layers that are called one after the other with one and the same tensor.
        takes_positions: Whether the model's forward takes ``position_ids``.
        isolates_documents: Whether packed documents, told by their positions, do not see each other.
        by_document: Names of the modules in the layers that must run on each packed document by itself for that.
        one_stage_only: Why the model cannot be cut, so that all its layers are one group; None if it can.
        balances_routers: Whether config.json asks for the routers' auxiliary loss (``output_router_logits``).

    Raises:
        ConfigurationError: No readable ``config.json``, not a causal LM that transformers ships, or a model that
            cannot be cut between its decoder layers.
    """

    def __init__(
        self, model_dir: str | Path, *, trust_remote_code: bool = False, attn_implementation: str | None = None
    ) -> None:
        self.model_dir = Path(model_dir).expanduser()
        if not self.model_dir.is_dir():
            raise ConfigurationError(f"{model_dir} is not a directory; model_dir must name a local Hugging Face model.")
        self.trust_remote_code = trust_remote_code
        self.config = read_config(self.model_dir, trust_remote_code)
        asked = attention_of(self.config)
        if attn_implementation is None and asked not in (None, *varlen.OF_TRANSFORMERS):
            raise ConfigurationError(
                f"{self.model_dir / 'config.json'} asks for attn_implementation {asked}, which is none of those that "
                "are known here; set attn_implementation to sdpa, or take it out of config.json."
            )
        self._build = partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)
        if attn_implementation is not None:
            self._build = partial(self._build, attn_implementation=attn_implementation)
        self.balances_routers = bool(getattr(self.config, "output_router_logits", False))
        if self.balances_routers:
            self.config.output_router_logits = False  # a stage has the routers of its own layers only: see router.py
        self.is_text_part = self.config.model_type != read_json(self.model_dir / "config.json")["model_type"]
        try:
            with torch.device("meta"):
                # bfloat16 as some kernels (grouped matrix products) exist for no other type; only shapes matter here.
                self.model: PreTrainedModel = self._build(self.config, dtype=torch.bfloat16)
        except Exception as error:
            raise ConfigurationError(
                f"{self.model_dir / 'config.json'} describes no model that can be built: {_first_line(error)}"
            ) from error
        self.config = self.model.config
        embedding_first(self.model)
        self.embedding_name = self._name_of(self.model.get_input_embeddings(), "input embedding")
        self.head_name = self._name_of(self.model.get_output_embeddings(), "output head")
        embedding, head = (self.model.get_submodule(name) for name in (self.embedding_name, self.head_name))
        self.tied = embedding.weight is head.weight
        try:
            probe = Probe(self.config, self._build)
        except Exception as error:
            raise self._refusal(f"no tiny model of its class could be tried: {_first_line(error)}") from error
        self._explore(probe)
        self._probe = probe = self._attend_exactly(probe, asked=attn_implementation)
        self.takes_positions = probe.takes_positions
        try:
            sees_the_future = probe.sees_the_future()
        except Exception as error:
            raise self._refusal(f"a trial forward failed: {_first_line(error)}") from error
        if sees_the_future:
            raise self._refusal("its tokens see later tokens (is_decoder in config.json may be false)")
        try:
            self.isolates_documents = probe.isolates_documents() or probe.isolate_documents(self.layer_names)
        except Exception:  # the class cannot run packed documents at all: they are refused
            self.isolates_documents = False
        self.by_document = probe.by_document
        if not is_static(self.model):
            self._check_long_documents()
        if self.tied and f"{self.embedding_name}.weight" not in dict(self.model.named_parameters()):
            raise self._refusal(f"its tied weight is called after {self.head_name}, not {self.embedding_name}")

    @property
    def layer_names(self) -> list[str]:
        """The names of the decoder layers, in order."""
        return [f"{self.layers_name}.{number}" for number in range(len(self.layers))]

    def layer_of(self, name: str) -> int | None:
        """Return the number of the decoder layer that the module or parameter ``name`` is in, or None."""
        number = name.removeprefix(self.layers_name + ".").split(".")[0]
        return int(number) if number.isdigit() and name.startswith(self.layers_name + ".") else None

    def _name_of(self, module: nn.Module | None, what: str) -> str:
        for name, candidate in self.model.named_modules():
            if module is not None and candidate is module and isinstance(getattr(module, "weight", None), Tensor):
                return name
        raise self._refusal(f"it names no {what}")

    def parameter_counts(self) -> list[int]:
        """Return the number of parameters that come with each group; see ``CausalLMLayers.parameter_counts``."""
        counts = [
            sum(p.numel() for layer in self.layers[first:after] for p in layer.parameters())
            for first, after in itertools.pairwise(self.groups)
        ]
        for name, module in self.model.named_modules():
            own = sum(p.numel() for p in module.parameters(recurse=False))
            if name in self.start_names:
                counts[0] += own
            if name in self.tail_names:
                counts[-1] += own
        return counts

    def _attend_exactly(self, probe: Probe, *, asked: str | None) -> Probe:
        """Attend in plain operations ("eager") if the class's faster code leaves out something of its attention.

        Before transformers 5.23, scaled dot-product attention drops the soft cap of Gemma 2's scores without a word.

        Returns:
            A probe that attends as the model will.
        """
        if attention_of(self.config) == "eager":
            return probe
        build = partial(self._build, attn_implementation="eager")
        try:
            eager = Probe(self.config, build, probe)
            same = probe.layers_attend_as(eager, self.layer_names)
        except Exception:  # the class has no other code, or none that can be tried
            return probe
        if same:
            return probe
        if asked is not None:
            raise ConfigurationError(
                f"{self.model_dir}: attn_implementation {asked} leaves out something of how a model of type "
                f"{self.config.model_type} attends; set it to auto."
            )
        self._build = build
        set_attention(self.config, "eager")
        return eager

    @cache  # noqa: B019  (meta_models are few, and live as long as the job)
    def fits_varlen(self) -> bool:
        """Tell whether the class attends as :func:`varlen_attention` does: with it, a tiny model gives the same."""
        varlen.register()  # nobody attends by it who has not asked here
        try:
            probe = Probe(self.config, partial(self._build, attn_implementation=varlen.NAME), self._probe)
            return probe.attends_as(self._probe)
        except Exception:  # whatever the class asks for that it does not do
            return False

    def router_loss(self) -> RouterLoss:
        """Return how the class balances its routers.

        Raises:
            ConfigurationError: It has no routers, or balances them in a way of its own.
        """
        try:
            probe = Probe(self.config, self._build)
            return find_router_loss(self.model, probe.model, probe.input_ids)
        except Exception as error:
            raise ConfigurationError(
                f"{self.model_dir}: the routers of a model of type {self.config.model_type} cannot be balanced because "
                f"{_first_line(error)}; set router_aux_loss_coef to 0."
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Tells the directory's model from others, as it was when it was first asked for."""
        return fingerprint(self.model_dir)

    @cached_property
    def whole(self) -> WholeModel:
        """What transformers makes of the directory: of a multimodal model, more than the text model alone.

        Raises:
            ConfigurationError: It cannot be built, or the text model is not found in it.
        """
        if not self.is_text_part:
            return WholeModel(self.model, self.model)
        return whole_model(self.model_dir, self.model, self.trust_remote_code)

    def tiny(self) -> PreTrainedModel:
        """Return a tiny random model of the same class and depth, on the CPU in float32."""
        return Probe(self.config, self._build).model

    @property
    def can_recompute(self) -> bool:
        """Whether the model's code can run a decoder layer again in the backward pass (activation checkpointing)."""
        switch = any(hasattr(module, "gradient_checkpointing") for module in self.model.modules())
        return switch and self.model.supports_gradient_checkpointing

    def _check_long_documents(self) -> None:
        """Try documents that are longer than the model was made for, if its positions are not known to be static."""
        try:
            tried = try_long_documents(
                self.config, self._build, takes_positions=self.takes_positions, by_document=self.by_document
            )
        except Exception as error:
            raise self._refusal(f"no tiny model with few positions could be tried: {_first_line(error)}") from error
        if not tried.forgets:
            raise self._refusal("after a long document, it runs the next ones otherwise than before")
        self.isolates_documents &= tried.apart

    def _explore(self, probe: Probe) -> None:
        """Find the decoder layers by a trial, and check that the model is embedding, layers in order, then the rest."""
        modules = {name: module for name, module in self.model.named_modules() if name}
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 0]
        weighted = [name for name, m in modules.items() if any(p is not None for p in m._parameters.values())]
        outermost = [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]
        reasons: dict[str, str] = {}
        self.one_stage_only: str | None = None
        for name in sorted(outermost, key=lambda name: -sum(p.numel() for p in modules[name].parameters())):
            try:
                unfit = self._try_layers(probe, name, weighted)
            except Exception as error:
                raise self._refusal(f"a trial forward failed: {_first_line(error)}") from error
            if unfit is None:
                return
            reasons[name] = unfit
        if not reasons:
            raise self._refusal("it has no list of decoder layers")
        chosen = next((name for name, reason in reasons.items() if reason != NOT_IN_ORDER), next(iter(reasons)))
        self._keep_together(probe, chosen, weighted)
        self.one_stage_only = reasons[chosen]

    def _keep_together(self, probe: Probe, layers_name: str, weighted: list[str]) -> None:
        """Take the list ``layers_name`` for the decoder layers of a model that is not cut, whatever else it does."""
        self._try_layers(probe, layers_name, weighted)
        outside = [name for name in weighted if self.layer_of(name) is None]
        trace = probe.trace(self.layer_names, outside)
        started = [name for name in trace.order if name in self.layer_names]
        before = trace.order[: trace.order.index(started[0])] if started else []
        self.start_names = [name for name in outside if name in before]
        self.tail_names = [name for name in outside if name not in before]
        self.tuple_lengths = trace.tuple_lengths
        self.shared_inputs = [names for names in trace.shared_inputs if len(names) > 1]
        self.groups = [0, len(self.layers)]

    def _try_layers(self, probe: Probe, layers_name: str, weighted: list[str]) -> str | None:
        """Take the list ``layers_name`` for the decoder layers; return why that does not fit, or None."""
        self.layers_name = layers_name
        self.layers = list(self.model.get_submodule(layers_name))
        layer_names = [f"{layers_name}.{number}" for number in range(len(self.layers))]
        outside = [name for name in weighted if self.layer_of(name) is None]
        trace = probe.trace(layer_names, outside)
        order = trace.order
        if [name for name in order if name in layer_names] != layer_names:
            return NOT_IN_ORDER
        if trace.hidden_missing:
            return "its decoder layers are not called with hidden states first"
        first, last = order.index(layer_names[0]), order.index(layer_names[-1])
        self.start_names = [name for name in outside if name in order[:first] and name not in order[first:]]
        self.tail_names = [name for name in outside if name in order[last:] and name not in order[:last]]
        if misplaced := set(outside) - {*self.start_names, *self.tail_names}:
            more = f" and {len(misplaced) - 2} more" if len(misplaced) > 2 else ""
            names = ", ".join(sorted(misplaced)[:2])
            return f"it has weights in {names}{more} that are not only before or after its layers"
        if self.embedding_name not in self.start_names or self.head_name not in self.tail_names:
            return "it does not run as embedding, decoder layers, and head"
        self.tuple_lengths = trace.tuple_lengths
        self.shared_inputs = [names for names in trace.shared_inputs if len(names) > 1]
        bound = {0, len(self.layers)}
        self.groups = sorted(
            bound | {cut for cut in range(1, len(self.layers)) if not any(i < cut <= j for i, j in trace.carried)}
        )
        if len(self.groups) == 2 < len(self.layers):
            source = "what comes before them" if any(i == START for i, _ in trace.carried) else "each other's state"
            return f"all its decoder layers need {source}, beside the hidden states"
        return None

    def _refusal(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.model_dir}: a model of type {self.config.model_type} cannot be trained because "
            f"{reason}; choose another model."
        )


def embedding_first(model: PreTrainedModel) -> None:
    """Put the part of ``model`` that holds the embedding first, so that a tied weight is called after the embedding."""
    embedding = model.get_input_embeddings()
    for name, child in list(model.named_children()):
        if not any(module is embedding for module in child.modules()):
            model._modules[name] = model._modules.pop(name)


def _first_line(error: Exception) -> str:
    first, *others = (str(error) or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def read_config(model_dir: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Read a model directory's config.json.

    Raises:
        ConfigurationError: It is not there, or transformers refuses it.
    """
    path = model_dir / "config.json"
    if not read_json(path).get("model_type"):
        raise ConfigurationError(f"{path} has no model_type; give the directory of a Hugging Face causal LM.")
    try:
        config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly anything here: ValueError, KeyError, validation errors
        if not trust_remote_code and "auto_map" in read_json(path):
            raise ConfigurationError(
                f"{path} asks for code of the model's own; set trust_remote_code to true if you trust who wrote it."
            ) from error
        raise ConfigurationError(
            f"{path} is no configuration that this version of transformers knows: {_first_line(error)}"
        ) from error
    text_config = config.get_text_config(decoder=True)
    if text_config is not config and text_config.model_type != config.model_type:
        # Beside images or sound: the text model alone, with the outer word on whether its ends are tied.
        if "tie_word_embeddings" in read_json(path):
            text_config.tie_word_embeddings = config.tie_word_embeddings
        config = text_config
    known = type(config) in AutoModelForCausalLM._model_mapping
    brought = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not (known or brought) or getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"{path}: model type {config.model_type} is not a causal LM; choose a causal LM.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(
            f"{path} has a quantization_config; give the original model and set load_in_4bit if it shall be quantised."
        )
    config.use_cache = False
    return config
