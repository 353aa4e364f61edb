"""Training through the pipeline, and the same in a plain loop over the unsplit model, to compare the numbers."""

from __future__ import annotations

import itertools
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from optimi import Adam
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig

from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import Adapter, Full, LoRA
from lightning_pipelite.data.sampler import PackedSampler
from lightning_pipelite.models import CausalLMLayers
from routing_ties import ClosestChoice

MICRO_BATCHES, CLIP, LR = 8, 0.1, 2e-3
LOSS_LIMIT, WEIGHT_LIMIT = 1e-5, 1e-4


@dataclass(frozen=True)
class Scale:
    """The sizes of the model and the data, which the seed draws, and the device."""

    vocabulary: int = 512
    hidden: int = 64
    layers: int = 4
    sequence: int = 64
    sequences: int = 75
    seed: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    gpu: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0" if self.gpu else "cpu")


@dataclass(frozen=True)
class Case:
    """A way to train."""

    name: str
    tied: bool = False
    full: bool = False
    layers: str | None = None
    targets: tuple[str, ...] = ()
    in_4bit: bool = False
    in_fp8: bool = False
    tokens: tuple[int, ...] = ()  # tokens whose rows of embedding and head are trained too
    experts: bool = False  # a mixture of experts, trained with its routers' auxiliary loss


@dataclass(frozen=True)
class Split:
    """How the job is distributed over processes."""

    stages: int
    replicas: int = 1
    column_major: bool = False
    virtual_stages: int = 1

    def __str__(self) -> str:
        layout = (
            "" if self.stages == 1 or self.replicas == 1 else ", column-major" if self.column_major else ", row-major"
        )
        pieces = f", {self.virtual_stages} virtual" if self.virtual_stages > 1 else ""
        return f"{self.stages} x {self.replicas}{layout}{pieces}"


CASES = (
    Case("full, untied", full=True),
    Case("full, tied", full=True, tied=True),
    Case("LoRA, all layers"),
    Case("LoRA, first layer only", layers="0"),
    Case("LoRA, last layer only", layers="last"),
    Case("LoRA, 4-bit base", in_4bit=True),
    Case("LoRA, FP8 base, dequantised", in_fp8=True),
    Case("full, experts and router loss", full=True, experts=True),
)


def make_model(directory: Path, case: Case, scale: Scale) -> int:
    """Write a Llama or a Mixtral with random weights, norms included, and return the number of its parameters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": scale.vocabulary, "hidden_size": scale.hidden, "intermediate_size": 4 * scale.hidden,
        "num_hidden_layers": scale.layers, "num_attention_heads": max(4, scale.hidden // 128), "num_key_value_heads": 2,
        "tie_word_embeddings": case.tied, "max_position_embeddings": scale.sequence,
    }  # fmt: skip
    experts = MixtralConfig(**sizes, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.05)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(experts if case.experts else LlamaConfig(**sizes))
        model = model.to(getattr(torch, scale.dtype))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def sequences(scale: Scale) -> list[dict[str, Tensor]]:
    """Return packed sequences of random tokens, with documents of random lengths and unequally many masked labels."""
    generator = torch.Generator().manual_seed(scale.seed)

    def draw(low: int, high: int, size: tuple[int, ...] = ()) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    made, length = [], scale.sequence
    for _ in range(scale.sequences):
        tokens = draw(0, scale.vocabulary, (length,))
        labels = torch.cat([tokens[1:], torch.tensor([-100])])
        border = int(draw(8, length - 8))
        positions = torch.cat([torch.arange(border), torch.arange(length - border)])
        labels[border - 1] = -100
        labels[int(draw(4, length)) :] = -100
        made.append({"input_ids": tokens, "labels": labels, "position_ids": positions})
    return made


def make_adapter(case: Case, scale: Scale) -> Adapter:
    if case.full:
        return Full()
    layers = str(scale.layers - 1) if case.layers == "last" else case.layers
    tokens = list(case.tokens) or None
    targets = list(case.targets) or "all-linear"
    return LoRA(rank=4, layers_to_transform=layers, target_modules=targets, trainable_token_indices=tokens)


class Sequences(Dataset[dict[str, Tensor]]):
    """A list of sequences; None, the sampler's padding, gives one without labels."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        if index is not None:
            return self._items[index]
        return {**self._items[0], "labels": torch.full_like(self._items[0]["labels"], -100)}


def train_split(
    case: Case, split: Split, model_dir: str, steps: int, scale: Scale
) -> tuple[list[float], dict[str, Tensor]] | None:
    """Train under PipeLiteStrategy, as one rank of several.

    Returns:
        On rank 0 the loss of each step and the final weights, by their names in the saved file; None elsewhere.
    """
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if len(losses) < trainer.global_step:
                losses.append(float(trainer.callback_metrics["train/loss"]))

    processes = split.stages * split.replicas
    strategy = PipeLiteStrategy(
        split.stages, use_column_major_topology=split.column_major, virtual_stages=split.virtual_stages
    )
    trainer = L.Trainer(
        strategy=strategy, accelerator="gpu" if scale.gpu else "cpu", devices=1 if scale.gpu else processes,
        num_nodes=processes if scale.gpu else 1,  # ranks that share one GPU act as nodes of one process each
        accumulate_grad_batches=MICRO_BATCHES // split.replicas, gradient_clip_val=CLIP, max_steps=steps, max_epochs=-1,
        callbacks=[Losses()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = PipeLiteModule(
        model_dir,
        make_adapter(case, scale),
        load_in_4bit=case.in_4bit,
        load_in_fp8=case.in_fp8,
        lr=LR,
        dtype=scale.dtype,
    )
    data = Sequences(sequences(scale))
    sampler = PackedSampler(data, **strategy.distributed_sampler_kwargs, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=1, sampler=sampler))
    collected = {name: t for stage in strategy.collect_stages(module.trained_state()) for name, t in stage.items()}
    return (losses, collected) if strategy.is_global_zero else None


def train_plain(
    case: Case, model_dir: str, steps: int, scale: Scale, *, alone: bool = False, choice: ClosestChoice | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Train the same in a plain loop over the unsplit model; the adapter is PEFT's, loaded from a file.

    Args:
        case: The way to train.
        model_dir: Directory of the model.
        steps: Number of steps.
        scale: Sizes of the data.
        alone: Run each document of a sequence separately. In some models, packed ones would attend to each other.
        choice: Observes the routers' choices.
    """
    dtype = getattr(torch, scale.dtype)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, device_map={"": scale.device},
        # Passing None would hide config.json's own entry for quantised files.
        **({"quantization_config": quantization} if case.in_4bit else {}),
    )  # fmt: skip
    if dtype == torch.float32 and not case.in_4bit:
        model = model.float()  # next to quantised weights, transformers keeps the files' dtype
    if case.in_fp8:
        use_what_codes_stand_for(model)
    if not case.full:
        adapter = make_adapter(case, scale)
        with tempfile.TemporaryDirectory() as directory:
            layers = CausalLMLayers(model_dir, dtype=dtype, load_in_4bit=case.in_4bit, adapter=adapter)
            state = layers.trained_state(layers.build_stage(0, len(layers), scale.device))
            adapter.save(Path(directory) / "adapter", [state], Path(model_dir))
            model = PeftModel.from_pretrained(model, f"{directory}/adapter", is_trainable=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adam(parameters, lr=LR, betas=(0.9, 0.99), eps=1e-6)
    data = sequences(scale)
    rounds = [data[i : i + MICRO_BATCHES] for i in range(0, len(data), MICRO_BATCHES)]
    losses = []
    for step, micro_batches in zip(range(steps), itertools.cycle(rounds), strict=False):
        count = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            tokens, positions, labels = (
                batch[key][None].to(scale.device) for key in ("input_ids", "position_ids", "labels")
            )
            starts = (positions[0] == 0).nonzero().flatten().tolist() if alone else [0]
            with choice or nullcontext():
                runs = [
                    model(input_ids=tokens[:, a:b], position_ids=positions[:, a:b], use_cache=False)
                    for a, b in itertools.pairwise([*starts, tokens.shape[1]])
                ]
            logits = torch.cat([outputs.logits for outputs in runs], dim=1)[0].float()
            loss = nn.functional.cross_entropy(logits, labels[0], reduction="sum") / count
            if case.experts:
                loss = loss + (labels != -100).sum() / count * model.config.router_aux_loss_coef * runs[0].aux_loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        decayed = 0.99 ** (step + 1)
        optimizer.param_groups[0]["lr"] = LR * ((1 - decayed) / (1 + decayed)) ** 0.5
        optimizer.step()
        optimizer.zero_grad()
    if not case.full:
        weights = get_peft_model_state_dict(model)
        return losses, {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    with tempfile.TemporaryDirectory() as directory:  # to compare in the files' names and layout
        model.save_pretrained(directory)
        return losses, load_file(f"{directory}/model.safetensors")


def use_what_codes_stand_for(model: Any) -> None:
    """Round the decoder's linear layers to e4m3 with a scale for each output channel."""
    for module in (module for layer in model.model.layers for module in layer.modules()):
        if isinstance(module, nn.Linear):
            scales = module.weight.data.float().abs().amax(1, keepdim=True) / 448
            codes = (module.weight.data / scales).to(torch.float8_e4m3fn)
            module.weight.data = (codes.float() * scales).to(module.weight.dtype)
