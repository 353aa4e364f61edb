"""The whole causal LM without its weights: the names of its parts, and where it can be cut."""

from __future__ import annotations

import itertools
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_pipelite.errors import ConfigurationError, first_line
from lightning_pipelite.models.attention import varlen
from lightning_pipelite.models.config import read_config
from lightning_pipelite.models.decoder_layers import find_decoder_layers
from lightning_pipelite.models.fingerprint import fingerprint
from lightning_pipelite.models.long_documents import try_long_documents
from lightning_pipelite.models.probe import Probe
from lightning_pipelite.models.rope import is_static
from lightning_pipelite.models.router import RouterLoss, find_router_loss
from lightning_pipelite.models.stored.known import refuse_transposed, stored_format
from lightning_pipelite.models.text_part import TEXT_MODEL_NAMES
from lightning_pipelite.models.transformers_compat import attention_of, set_attention
from lightning_pipelite.models.weight_files import read_json
from lightning_pipelite.models.whole_model import WholeModel, whole_model


class MetaModel:
    """A causal LM on the meta device, with the names of the parts that a pipeline distributes.

    There is no table of models: the decoder layers are a ``ModuleList`` whose modules run once each, in order, and a
    trial of a tiny model of the same class shows what runs before, in and after them and what passes between them.

    Args:
        model_dir: Directory of a Hugging Face causal LM; only ``config.json`` is read.
        trust_remote_code: Run the model's own code from ``model_dir``, if it has any.
        attn_implementation: How attention is computed; transformers' choice if not given.

    Attributes:
        config: The model's configuration, with ``use_cache`` off; for a multimodal model, its text model's.
        stored: The format in which the files hold quantised weights; None if they hold none.
        model: The whole model on the meta device. Tied weights are a single parameter.
        auto: The class that builds and loads it, like transformers' auto classes.
        is_text_part: Whether this is the text model of a multimodal one; images and sound are left out.
        key_mapping: Maps a multimodal checkpoint's names to those of a separate text model; None if they do not change.
        layers_name: Name of the list of decoder layers, such as ``model.layers``.
        layers: The decoder layers, in order.
        embedding_name: Name of the input embedding, such as ``model.embed_tokens``.
        head_name: Name of the output projection, such as ``lm_head``.
        start_names: Modules with weights that run before the first decoder layer, including the embedding.
        tail_names: Modules with weights that run after the last decoder layer: final norm and head.
        tied: Whether head and embedding share one weight.
        groups: Bounds of the groups of decoder layers that share more than hidden states, and so must share a stage:
            group g has the layers from ``groups[g]`` to ``groups[g + 1]``, exclusive. Usually one layer each.
        tuple_lengths: For each decoder layer, how many values it returns in a tuple; 0 if it returns no tuple.
        start_inputs: For each decoder layer, which of its arguments besides the hidden states, by position or name, are
            computed before the layers, by the first stage alone: Gemma 3n's inputs of each layer.
        shared_inputs: Groups of linear layers, by name, that are called consecutively with the same tensor.
        takes_positions: Whether the model's forward takes ``position_ids``.
        isolates_documents: Whether packed documents, given by their positions, do not see each other.
        by_document: Names of the modules in the layers that must run on each packed document separately for that.
        one_stage_only: Why the model cannot be cut, so that all its layers are one group; None if it can.
        balances_routers: Whether config.json enables the routers' auxiliary loss (``output_router_logits``).

    Raises:
        ConfigurationError: ``config.json`` is missing or unreadable, the model is not a causal LM that can be built,
            or a trial of its class fails or shows something that is not supported.
    """

    def __init__(
        self, model_dir: str | Path, *, trust_remote_code: bool = False, attn_implementation: str | None = None
    ) -> None:
        self.model_dir = Path(model_dir).expanduser()
        if not self.model_dir.is_dir():
            raise ConfigurationError(f"{model_dir} is not a directory; model_dir must name a local Hugging Face model.")
        self.trust_remote_code = trust_remote_code
        self.config, self.auto = read_config(self.model_dir, trust_remote_code)
        self.stored = stored_format(self.model_dir)
        asked = attention_of(self.config)
        if attn_implementation is None and asked not in (None, *varlen.OF_TRANSFORMERS):
            raise ConfigurationError(
                f"{self.model_dir / 'config.json'} sets attn_implementation to {asked}, which is not supported; set "
                "attn_implementation to sdpa, or remove it from config.json."
            )
        self._build = partial(self.auto.from_config, trust_remote_code=trust_remote_code)
        if attn_implementation is not None:
            self._build = partial(self._build, attn_implementation=attn_implementation)
        self.balances_routers = bool(getattr(self.config, "output_router_logits", False))
        if self.balances_routers:
            self.config.output_router_logits = False  # a stage only has the routers of its own layers: see router.py
        self.is_text_part = self.config.model_type != read_json(self.model_dir / "config.json")["model_type"]
        self.key_mapping = TEXT_MODEL_NAMES if self.is_text_part and self.auto is AutoModelForCausalLM else None
        try:
            with torch.device("meta"):
                # bfloat16: some kernels (grouped matrix products) support no other dtype, and only shapes matter here.
                self.model: PreTrainedModel = self._build(self.config, dtype=torch.bfloat16)
        except Exception as error:
            raise ConfigurationError(
                f"the model described by {self.model_dir / 'config.json'} cannot be built: {first_line(error)}"
            ) from error
        refuse_transposed(self.stored, self.model, self.model_dir)
        self.config = self.model.config.get_text_config(decoder=True)
        embedding_first(self.model)
        self.embedding_name = self._name_of(self.model.get_input_embeddings(), "input embedding")
        self.head_name = self._name_of(self.model.get_output_embeddings(), "output head")
        embedding, head = (self.model.get_submodule(name) for name in (self.embedding_name, self.head_name))
        self.tied = embedding.weight is head.weight
        try:
            probe = Probe(self.config, self._build)
        except Exception as error:
            raise self._refusal(f"the trial of a tiny model of its class failed: {first_line(error)}") from error
        try:
            found = find_decoder_layers(self.model, probe, self.embedding_name, self.head_name)
        except ValueError as error:
            raise self._refusal(str(error)) from error
        self.layers_name, self.layers, self.groups = found.layers_name, found.layers, found.groups
        self.start_names, self.tail_names = found.start_names, found.tail_names
        self.tuple_lengths, self.shared_inputs = found.tuple_lengths, found.shared_inputs
        self.start_inputs = found.start_inputs
        self.one_stage_only = found.one_stage_only
        self._probe = probe = self._attend_exactly(probe, asked=attn_implementation)
        self.takes_positions = probe.takes_positions
        try:
            sees_the_future = probe.sees_the_future()
        except Exception as error:
            raise self._refusal(f"a trial forward failed: {first_line(error)}") from error
        if sees_the_future:
            raise self._refusal("its tokens attend to later tokens (is_decoder in config.json may be false)")
        try:
            self.isolates_documents = probe.isolates_documents() or probe.isolate_documents(self.layer_names)
        except Exception:  # the class cannot run packed documents at all, so they are refused
            self.isolates_documents = False
        self.by_document = probe.by_document
        if not is_static(self.model):
            self._check_long_documents()
        if self.tied and f"{self.embedding_name}.weight" not in dict(self.model.named_parameters()):
            raise self._refusal(f"its tied weight is named after {self.head_name}, not {self.embedding_name}")

    @cached_property
    def bypassed_in_training(self) -> set[str]:
        """Names of linear layers whose weights training uses without calling them; adapters on them would not train."""
        return self._probe.bypassed_in_training()

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
        raise self._refusal(f"its {what} cannot be found")

    def parameter_counts(self) -> list[int]:
        """Return the number of parameters of each group; see ``CausalLMLayers.parameter_counts``."""
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
        """Switch to plain operations ("eager") if the class's faster attention code omits part of its attention.

        Before transformers 5.23, scaled dot-product attention silently drops the soft cap of Gemma 2's scores.

        Returns:
            A probe that attends as the model will.
        """
        if attention_of(self.config) == "eager":
            return probe
        build = partial(self._build, attn_implementation="eager")
        try:
            eager = Probe(self.config, build, probe)
            same = probe.layers_attend_as(eager, self.layer_names)
        except Exception:  # the class has no eager code, or none that can be tried
            return probe
        if same:
            return probe
        if asked is not None:
            raise ConfigurationError(
                f"{self.model_dir}: attn_implementation {asked} omits part of the attention of a model of type "
                f"{self.config.model_type}; set it to auto."
            )
        self._build = build
        set_attention(self.config, "eager")
        return eager

    @cache  # noqa: B019  (meta_models are few, and live as long as the job)
    def fits_varlen(self) -> bool:
        """Return whether a tiny model of the class gives the same logits with :func:`varlen_attention`."""
        varlen.register()  # affects only models that select it by name
        try:
            probe = Probe(self.config, partial(self._build, attn_implementation=varlen.NAME), self._probe)
            return probe.attends_as(self._probe)
        except Exception:  # whatever the class requires that varlen does not support
            return False

    def router_loss(self) -> RouterLoss:
        """Return how the class balances its routers.

        Raises:
            ConfigurationError: It has no routers, or balances them in an unknown way.
        """
        try:
            probe = Probe(self.config, self._build)
            return find_router_loss(self.model, probe.model, probe.input_ids)
        except Exception as error:
            raise ConfigurationError(
                f"{self.model_dir}: the routers of a model of type {self.config.model_type} cannot be balanced because "
                f"{first_line(error)}; set router_aux_loss_coef to 0."
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the directory's model, as of the first access."""
        return fingerprint(self.model_dir)

    @cached_property
    def whole(self) -> WholeModel:
        """The model that transformers loads from the directory: a multimodal one has more than the text model.

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
        """Try documents longer than the model was made for, as its rotary frequencies are not known to be static."""
        try:
            tried = try_long_documents(
                self.config, self._build, takes_positions=self.takes_positions, by_document=self.by_document
            )
        except Exception as error:
            raise self._refusal(f"the trial of a tiny model with few positions failed: {first_line(error)}") from error
        if not tried.forgets:
            raise self._refusal("after a long document, it computes the next ones differently")
        self.isolates_documents &= tried.apart

    def _refusal(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.model_dir}: a model of type {self.config.model_type} cannot be trained because "
            f"{reason}; choose another model."
        )


def embedding_first(model: PreTrainedModel) -> None:
    """Move the part of ``model`` with the embedding to the front, so that a tied weight is named after the latter."""
    embedding = model.get_input_embeddings()
    for name, child in list(model.named_children()):
        if not any(module is embedding for module in child.modules()):
            model._modules[name] = model._modules.pop(name)
