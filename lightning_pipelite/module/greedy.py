"""Text that the model writes during training: greedy decoding through all stages."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_pipelite.models.head import HeadInputs
from lightning_pipelite.module.batches import IGNORED
from lightning_pipelite.shared.wording import counted

if TYPE_CHECKING:
    from lightning_pipelite.strategy import PipeLiteStrategy


class GreedyWriter:
    """Continues prompts with the model as it is. Only for inspection: each token takes a pass over the whole sequence.

    Args:
        model_dir: Directory with the tokenizer.
        keys: What the adapter needs in a batch besides the tokens: for Control Adapters the class, here 1.
        trust_remote_code: Run the tokenizer's own code, if it has any.
        positions: Number of positions that the model has embeddings for; None for no limit.
    """

    def __init__(self, model_dir: Path, keys: tuple[str, ...], trust_remote_code: bool, positions: int | None) -> None:
        self._model_dir, self._trust_remote_code = model_dir, trust_remote_code
        self._keys, self._positions = keys, positions

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self._model_dir, local_files_only=True, trust_remote_code=self._trust_remote_code
        )

    @cached_property
    def _ends(self) -> list[int]:
        from transformers import GenerationConfig

        ends = self._tokenizer.eos_token_id
        if (self._model_dir / "generation_config.json").is_file():  # a chat model's end of turn is only here
            own = GenerationConfig.from_pretrained(self._model_dir, local_files_only=True).eos_token_id
            ends = ends if own is None else own
        return ends if isinstance(ends, list) else [ends]

    def write(self, prompt: str, max_new_tokens: int, strategy: PipeLiteStrategy) -> str:
        """Continue a prompt as transformers' ``generate(do_sample=False)`` does. Collective.

        Args:
            prompt: The same on all ranks.
            max_new_tokens: Maximum number of tokens to write.
            strategy: Runs the stages.

        Returns:
            The text that follows the prompt, on every rank.
        """
        ids = list(self._tokenizer(prompt)["input_ids"])
        begin, length = len(ids), len(ids) + max_new_tokens
        if self._positions is not None:  # where they end, so does the text
            if begin >= self._positions:
                return f"(nothing: the prompt has {counted(begin, 'token')}, the model has {self._positions} positions)"
            length = min(length, self._positions)
        while len(ids) < length:
            batch = strategy.batch_to_device(self._batch(ids, length))
            total, count = strategy.evaluation.by(_next_token, batch, f"token {len(ids) + 1} of a sample")
            ids.append(round(total / count))
            if ids[-1] in self._ends:
                break
        return str(self._tokenizer.decode(ids[begin:], skip_special_tokens=True))

    def _batch(self, ids: list[int], length: int) -> dict[str, Tensor]:
        """Make a batch of the same length for every token of a sample: no token attends to the padding after it."""
        padded = torch.tensor([[*ids, *[0] * (length - len(ids))]])
        labels = torch.full_like(padded, IGNORED)
        labels[0, len(ids) - 1] = 0  # not ignored: the place whose next token is wanted
        positions = torch.arange(length).expand_as(padded).contiguous()
        return {
            "input_ids": padded,
            "labels": labels,
            "position_ids": positions,
            **{key: torch.ones_like(padded) for key in self._keys},
        }


def _next_token(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most probable token, and one, in place of a loss and its count."""
    scores = outputs if isinstance(outputs, (Tensor, HeadInputs)) else outputs[0]
    place = labels.flatten() != IGNORED
    if isinstance(scores, HeadInputs):  # scale and softcap do not change which logit is the largest
        hidden, bias = scores.hidden.flatten(0, 1)[place], scores.bias
        logits = torch.nn.functional.linear(hidden, scores.weight, bias)
        if scores.rows is not None:
            numbers, values = scores.rows
            theirs = torch.nn.functional.linear(hidden, values.to(hidden), None if bias is None else bias[numbers])
            logits = logits.index_copy(-1, numbers, theirs)
    else:
        logits = scores.flatten(0, 1)[place]
    token = logits.argmax(-1).sum().double()
    return token, torch.ones_like(token)
