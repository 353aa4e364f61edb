"""Unpacks integers of few bits from 32-bit words, as GPTQ, AWQ and compressed-tensors pack them."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes of int32 words [.., n], lowest bits first, as int16 [.., n * 32 / bits].

    If ``bits`` does not divide 32, codes may straddle two words: 32 codes then fill ``bits`` words.
    """
    share = bits if WORD % bits else 1  # consecutive words that whole codes fill
    places = torch.arange(0, WORD * share, bits, device=words.device)
    number, shift = places // WORD, places % WORD
    within = (WORD - shift).clamp_max(bits)  # how many bits of a code are in its first word
    words = words.unflatten(-1, (-1, share))
    codes = (words[..., number] >> shift.to(torch.int32)) & ((1 << within) - 1).to(torch.int32)
    codes = codes.to(torch.int16)
    for place in (within < bits).nonzero().flatten().tolist():
        rest = words[..., int(number[place]) + 1] & ((1 << (bits - int(within[place]))) - 1)
        codes[..., place] |= (rest << int(within[place])).to(torch.int16)
    return codes.flatten(-2)
