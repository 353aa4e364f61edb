"""Composite weight decay and adapter norms in any Lightning project: DDP, and a model with PEFT's LoRA.

    python examples/callbacks_ddp.py --devices 2

It uses only two callbacks from lightning_pipelite. It prints the norms of B·A as they grow, and by how much each step's
decay reduces them.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pipelite.callbacks import AdapterNorms, CompositeWeightDecay


class LoraOnBytes(L.LightningModule):
    """A small random Llama over bytes, with a LoRA to train."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(LlamaForCausalLM(config), lora)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (tokens,) = batch
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)


class ShowNorms(L.Callback):
    """Prints the values that the two callbacks have logged."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero and "train/norms_avg" in shown:
            text = ", ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items()) if name.endswith("avg"))
            print(f"step {trainer.global_step}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--weight-decay", type=float, default=2.0)
    arguments = parser.parse_args()
    L.seed_everything(0)
    text = "".join(topics[name] for name in sorted(topics)).encode()
    rows = torch.tensor(list(text[: 2000 * 64])).view(-1, 64)
    trainer = L.Trainer(
        strategy="ddp", devices=arguments.devices, accelerator="auto", max_steps=arguments.steps, log_every_n_steps=10,
        callbacks=[CompositeWeightDecay(arguments.weight_decay), AdapterNorms(), ShowNorms()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LoraOnBytes(), DataLoader(TensorDataset(rows), batch_size=8))


if __name__ == "__main__":
    main()
