"""A causal LM on disk as the layers of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.kernels.fp8 import has_fp8
from lightning_pipelite.models.attention import varlen
from lightning_pipelite.models.attention.by_document import run_by_document
from lightning_pipelite.models.attention_choice import Attention, attention_on, check_attention
from lightning_pipelite.models.contents import check_contents
from lightning_pipelite.models.experts import group_experts, have_single_experts
from lightning_pipelite.models.head import fuse_head as find_fused_head
from lightning_pipelite.models.loading import load_trimmed
from lightning_pipelite.models.memory import (
    ActivationMemory,
    choose_activation_memory,
    compile_layers,
    set_activation_memory,
)
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.quantization.as_stored import keeps_stored
from lightning_pipelite.models.quantization.checks import Option, can_quantise, check_double_quant, check_quantisation
from lightning_pipelite.models.quantization.exclusive import check_weight_options
from lightning_pipelite.models.quantization.four_bit import fused_weights
from lightning_pipelite.models.quantization.fp8 import cache_transposes, plan_products, tell_how_computed
from lightning_pipelite.models.rope import follow_documents
from lightning_pipelite.models.router import RouterLoss
from lightning_pipelite.models.stage import Stage
from lightning_pipelite.models.trains import Trains
from lightning_pipelite.models.weight_files import check_weights, missing_files, refuse_adapter_beside
from lightning_pipelite.shared.protocol import LayerCosts


class CausalLMLayers:
    """A Hugging Face causal LM whose decoder layers can be distributed over pipeline stages.

    Everything that configuration and file headers reveal is checked here, before any weight is read.

    Args:
        model_dir: Directory with ``config.json`` and safetensors weights.
        dtype: Dtype of the weights (other than quantised ones) and of the computation.
        load_in_4bit: Hold the linear layers and the fused experts of the decoder in nf4; embedding, head, norms and
            routers keep ``dtype``.
        load_in_fp8: Hold the linear layers of the decoder in FP8, and compute with them in FP8 where the device can.
        fp8_transpose_cache: Also hold a transposed copy of FP8 weights, for the backward products in FP8.
        adapter: Defines what is trained.
        activation_memory: What is kept of a decoder layer until its backward pass: ``"keep"`` everything,
            ``"selective"`` the results of matrix products and attention, ``"recompute"`` the layer's input (activation
            checkpointing), ``"offload"`` that input in host memory; ``"auto"`` is recompute if the model supports it,
            else keep, until a plan sets a better policy.
        compile_layers: Compile each decoder layer (``torch.compile``); by default on GPUs, but not layers that loop
            over their experts.
        seed: Seed of the adapter's initial values, which do not depend on the partition.
        packed: Whether sequences may hold several documents. Layers that carry a state from token to token then run on
            each document separately, uncompiled. Some models cannot keep documents apart, such as those that count
            positions in their own way; they train with one document per sequence, and ``packed`` must be false.
        attn_implementation: ``"varlen"`` is FlashAttention over packed documents (:mod:`~lightning_pipelite.models.
            attention`), ``"sdpa"`` and ``"eager"`` are transformers'. ``"auto"`` is varlen for packed documents on GPUs
            that have it, if it supports the model's attention, else transformers' choice.
        bnb_4bit_use_double_quant: Quantise the scales of the 4-bit weights' blocks too.
        allow_pickled_weights: Load ``.bin`` files if there are no safetensors.
        trust_remote_code: Run the model's own code from ``model_dir``.
        fuse_head: Leave the head to the loss if it is linear: the last stage then returns the head's inputs,
            :class:`~lightning_pipelite.models.head.HeadInputs`.
        router_aux_loss_coef: Weight of the routers' load-balancing loss in a mixture of experts, 0 for none; if not
            given, config.json decides, by ``output_router_logits`` and its own coefficient.
        needs_weights: Whether all weight files must exist. If not, the layers only serve a plan: stages cannot be
            loaded, and only the files that exist are checked.

    Attributes:
        names: Class name of each item of a partition, in order: a decoder layer, or the first of a group of layers
            that need each other (``meta_model.groups``).
        meta_model: The whole model on the meta device.
        one_stage_only: Why all layers are one item; None if they can be split.
        compile_layers: As given; like ``activation_memory``, it may be changed before a stage is built.
        planned_fp8: For a plan, whether the GPU that it is for has products in FP8; None if it is for this machine's.

    Raises:
        ConfigurationError: The model is missing, damaged, not a causal LM or not supported, or the adapter does not fit
            it.

    Example::

        layers = CausalLMLayers("Llama-3.1-8B", adapter=LoRA(rank=16))
        first = layers.build_stage(0, 16, torch.device("cuda:0"))
        last = layers.build_stage(16, 32, torch.device("cuda:1"))
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        load_in_4bit: bool = False,
        adapter: Trains,
        activation_memory: ActivationMemory = "recompute",
        compile_layers: bool | None = None,
        seed: int = 0,
        packed: bool = True,
        attn_implementation: Attention = "auto",
        bnb_4bit_use_double_quant: bool = False,
        allow_pickled_weights: bool = False,
        trust_remote_code: bool = False,
        fuse_head: bool = False,
        router_aux_loss_coef: float | None = None,
        load_in_fp8: bool = False,
        fp8_transpose_cache: bool = False,
        needs_weights: bool = True,
    ) -> None:
        check_weight_options(
            load_in_4bit=load_in_4bit,
            load_in_fp8=load_in_fp8,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            fp8_transpose_cache=fp8_transpose_cache,
        )
        self.meta_model = meta_model = MetaModel(
            model_dir,
            trust_remote_code=trust_remote_code,
            attn_implementation=None if attn_implementation in ("auto", varlen.NAME) else attn_implementation,
        )
        check_attention(meta_model, attn_implementation)
        self._attn_implementation = attn_implementation
        refuse_adapter_beside(meta_model.model_dir)
        if packed and not meta_model.isolates_documents:
            raise ConfigurationError(
                f"{model_dir}: a model of type {meta_model.config.model_type} would let packed documents see each "
                "other; set packed to false with one document per sequence, or choose another model."
            )
        activation_memory = choose_activation_memory(activation_memory, meta_model)
        has_weights = needs_weights or not missing_files(meta_model.model_dir)
        # Quantised weights are read from safetensors only.
        allow_pickled = allow_pickled_weights and meta_model.stored is None
        self._pickled = has_weights and not check_weights(meta_model.model_dir, allow_pickled=allow_pickled)
        check_quantisation(meta_model, adapter, load_in_4bit=load_in_4bit, load_in_fp8=load_in_fp8)
        adapter.check(meta_model, load_in_4bit=load_in_4bit)
        self.router_loss: RouterLoss | None = None
        if router_aux_loss_coef or (router_aux_loss_coef is None and meta_model.balances_routers):
            self.router_loss = meta_model.router_loss()
            if router_aux_loss_coef is not None:
                self.router_loss = replace(self.router_loss, coefficient=router_aux_loss_coef)
        if has_weights and not self._pickled:  # pickled files have no headers; loading will show errors
            check_contents(meta_model)
        self.adapter = adapter
        self.dtype = dtype
        self.load_in_4bit, self.load_in_fp8 = load_in_4bit, load_in_fp8
        self.fp8_transpose_cache = fp8_transpose_cache
        self.planned_fp8: bool | None = None
        self._fuse_head = fuse_head
        self.double_quant = check_double_quant(meta_model.stored, bnb_4bit_use_double_quant, load_in_4bit)
        self.activation_memory: ActivationMemory = activation_memory
        self.compile_layers = compile_layers
        self.seed = seed
        self.packed = packed
        self.costs: LayerCosts | None = None
        self.one_stage_only = meta_model.one_stage_only
        self.names = [type(meta_model.layers[first]).__name__ for first in meta_model.groups[:-1]]

    @property
    def skeleton(self) -> MetaModel:
        """The former name of ``meta_model``, kept for existing programs."""
        return self.meta_model

    def __len__(self) -> int:
        """Return the number of items of a partition: of decoder layers, unless some need each other."""
        return len(self.names)

    @property
    def vocabulary(self) -> tuple[int, int]:
        """The rows of the embedding and of the head: how many tokens can be read, and how many predicted."""
        model = self.meta_model.model
        embedding, head = (model.get_submodule(n) for n in (self.meta_model.embedding_name, self.meta_model.head_name))
        return embedding.weight.shape[0], head.weight.shape[0]

    @cached_property
    def lighter_weights(self) -> list[str]:
        """The options that would hold the weights in fewer bits than now, the fastest first.

        FP8 is among them if the GPU has FP8 products: the planned one, else the local one; or if there is none.
        """
        if self.load_in_4bit or self.adapter.changes_weights:
            return []
        able = has_fp8(torch.device("meta")) if self.planned_fp8 is None else self.planned_fp8
        faster = not self.load_in_fp8 and self.dtype == torch.bfloat16 and able
        options: list[Option] = ["load_in_fp8", "load_in_4bit"] if faster else ["load_in_4bit"]
        return [option for option in options if can_quantise(self.meta_model, self.adapter, option)]

    @property
    def weights_told(self) -> str | None:
        """How weights that are quantised on disk are held, in a few words; None if none are."""
        if self.meta_model.stored is None:
            return None
        stored = self.meta_model.stored
        held = "nf4" if self.load_in_4bit else "FP8" if self.load_in_fp8 else str(self.dtype).removeprefix("torch.")
        if keeps_stored(stored, load_in_4bit=self.load_in_4bit, load_in_fp8=self.load_in_fp8):
            fused = any(True for _ in fused_weights(self.meta_model.layers))
            return f"weights: {stored.title} on disk, held as stored" + (f", fused experts in {held}" if fused else "")
        anew = " with new per-row scales" if self.load_in_fp8 and stored.title.startswith("FP8") else ""
        return f"weights: {stored.title} on disk, held in {held}{anew}"

    def parameter_counts(self) -> list[int]:
        """Return the number of parameters of each item, including frozen ones; a 4-bit weight counts as one.

        The embedding is counted in the first item, final norm and head in the last; a weight that ties embedding and
        head is counted in both, as both stages hold it.
        """
        return self.meta_model.parameter_counts()

    def layer_costs(self) -> LayerCosts | None:
        """Return what the items cost to train; None unless a plan has set ``costs``."""
        return self.costs

    def build_stage(self, start: int, stop: int, device: torch.device) -> Stage:
        """Load items [start, stop) to ``device``, apply the adapter, and return them as a stage in training mode.

        The first stage has the embedding, the last the final norm and the head. ``Stage.named_parameters()`` gives
        each parameter the same name in every partition, and a weight that ties embedding and head the same name on
        both stages.

        Raises:
            ConfigurationError: A weight of the stage is missing from the files or has another shape there.
            ValueError: ``[start, stop)`` is not a range of items.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"items [{start}, {stop}) are not a range of the {len(self)} groups of decoder layers")
        start, stop = self.meta_model.groups[start], self.meta_model.groups[stop]
        attention = attention_on(device, self._attn_implementation, self.meta_model, self.dtype, packed=self.packed)
        model = load_trimmed(
            self.meta_model,
            start,
            stop,
            dtype=self.dtype,
            device=device,
            load_in_4bit=self.load_in_4bit,
            load_in_fp8=self.load_in_fp8,
            double_quant=self.double_quant,
            pickled=self._pickled,
            attn_implementation=attention,
        ).train()
        if device.type == "meta" and self.planned_fp8 is not None:
            plan_products(model, self.planned_fp8)
        tell_how_computed(model, device, transpose_cache=self.fp8_transpose_cache)
        follow_documents(model)
        mine = range(start, stop)
        apart = [name for name in self.meta_model.by_document if self.packed and self.meta_model.layer_of(name) in mine]
        run_by_document(model, apart)
        leaves_head = self._fuse_head and stop == len(self.meta_model.layers)
        # Before the adapter adds layers, which may need more inputs than tokens.
        fused_head = find_fused_head(model, model.get_submodule(self.meta_model.head_name)) if leaves_head else None
        layers = list(model.get_submodule(self.meta_model.layers_name))[start:stop]
        # Not compiled: the documents' lengths, and so the shapes, change with every micro-batch.
        by_document = {self.meta_model.layer_of(name) for name in apart}
        compiled = [
            layer for n, layer in zip(mine, layers, strict=True) if self.compiles_on(device) and n not in by_document
        ]
        others = [layer for layer in layers if not any(layer is each for each in compiled)]
        set_activation_memory(compiled, self.activation_memory, device, compiled=True)
        set_activation_memory(others, self.activation_memory, device, compiled=False)
        self.adapter.apply(model, self.meta_model, self.seed)
        if self.fp8_transpose_cache:  # after the adapter has joined weights
            cache_transposes(model)
        group_experts(layers)
        compile_layers(compiled)
        return Stage(
            model,
            self.meta_model.layers_name,
            start,
            stop,
            start_inputs=self.meta_model.start_inputs
            if self.one_stage_only is None
            else [[]] * len(self.meta_model.layers),
            takes_positions=self.meta_model.takes_positions,
            packed=self.packed,
            router_loss=self.router_loss,
            fused_head=fused_head,
        ).train()

    def compiles_on(self, device: torch.device) -> bool:
        """Return whether layers are compiled on ``device``.

        By default, on GPUs if each layer is a single graph: not if layers loop over their experts, which would break
        each into several graphs, or share more than the hidden states.
        """
        if self.compile_layers is not None:
            return self.compile_layers
        # Otherwise layers share more than the hidden states.
        whole = self.meta_model.one_stage_only is None and not any(self.meta_model.start_inputs)
        return device.type == "cuda" and whole and not have_single_experts(self.meta_model.layers)

    def trained_state(self, stage: Stage) -> dict[str, Tensor]:
        """Return what ``adapter.save`` needs from ``stage``: CPU tensors by their names in the saved file."""
        return self.adapter.state_dict(stage.causal_lm)
