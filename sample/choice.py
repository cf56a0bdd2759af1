"""Logits -> the next token: the filters, in the order of transformers, and the draw.

Logits are (B, V): B samples, V ids in the vocabulary.
"""

import math

import torch
from torch import Tensor

from sample.options import Choice


def choose(logits: Tensor, choice: Choice, seen: Tensor | None, uniform: Tensor) -> Tensor:
    """Ids (B,). `uniform` (B,): a random number in [0, 1) for each; `seen`: see `penalized`."""
    if seen is not None:
        logits = penalized(logits, seen, choice.repetition_penalty)
    if choice.temperature == 0:
        return logits.argmax(dim=-1)
    kept, ids = filtered(logits, choice)
    # Inverse transform sampling: one random number a row, where torch.multinomial draws one for
    # each of GPT-2's 50,257 tokens (0.08 ms against 1.8 ms on one core).
    cumulative = kept.softmax(dim=-1).cumsum(dim=-1, dtype=uniform.dtype)
    # Scaled by the last sum, which rounding may leave below 1: a number above it finds no token.
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
    # Where logits are NaN, which the decoder reports, none is found either.
    drawn.clamp_(max=kept.size(-1) - 1)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits, lower for the tokens that are true in `seen` (B, V) (CTRL, Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor | None]:
    """Logits (B, n) at the temperature, -inf for tokens that are excluded, and their ids (B, n),
    None if these are 0 to V - 1. At least one token remains.
    """
    ids = None
    if 0 < choice.top_k < logits.size(-1):  # first, so that the rest works on some 50 tokens, not 50,257
        logits, ids = _likeliest(logits, choice.top_k)
    elif choice.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    if choice.temperature != 1:
        logits = logits / choice.temperature
    if choice.top_p < 1:
        # Holtzman et al. 2020: the smallest set of likeliest tokens whose probabilities add up to
        # top_p. Summed from the least likely, a token is dropped if it and all below it have at
        # most 1 - top_p together.
        probability_from_here = logits.softmax(dim=-1).flip(-1).cumsum(dim=-1).flip(-1)
        dropped = probability_from_here <= 1 - choice.top_p
        dropped[:, 0] = False
        logits = logits.masked_fill(dropped, -torch.inf)
    if choice.min_p > 0:
        # Nguyen et al. 2024: kept are tokens at least min_p times as likely as the likeliest.
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(choice.min_p), -torch.inf)
    return logits, ids


def _likeliest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Logits (B, n) and ids (B, n) of the top_k likeliest tokens, in order, plus ties."""
    # One more than asked for shows whether the last one is tied, which is rare.
    best, ids = logits.topk(top_k + 1)
    last = best[:, top_k - 1 : top_k]
    if (best[:, top_k:] < last).all():
        return best[:, :top_k], ids[:, :top_k]
    # NaN equals nothing, and the decoder has yet to report it.
    best, ids = logits.topk(max(top_k, int((logits >= last).sum(dim=-1).max())))
    return best.masked_fill(best < last, -torch.inf), ids
