"""The next token, and the loop that asks for it.

Tokens are (B, T) ids of B samples that share one prompt. The model sees at most `block_size` tokens: when its key-value
cache is full, the older half of the window is forgotten and the newer half is read again at the first positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model import GPT, KeyValueCache


@dataclass(frozen=True)
class Choice:
    """How a token is drawn: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave every token in."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0


@torch.inference_mode()
def generate(
    model: GPT, prompt: list[int], samples: int, max_new_tokens: int, choice: Choice, generator: torch.Generator
) -> Iterator[list[int]]:
    """Yields, token after token, the next id of each of `samples` continuations of `prompt`, which is not empty."""
    block_size = model.config.block_size
    ids = torch.tensor([prompt[-block_size:]], device=generator.device).repeat(samples, 1)
    cache = KeyValueCache.empty(model, samples)
    unseen = ids
    for _ in range(max_new_tokens):
        if cache.length + unseen.size(1) > block_size:
            cache.length = 0
            unseen = ids = ids[:, -max(1, block_size // 2) :]
        chosen = choose(model.next_logits(unseen, cache), choice, generator)
        unseen = chosen.unsqueeze(1)
        ids = torch.cat([ids, unseen], dim=1)
        yield chosen.tolist()


def choose(logits: Tensor, choice: Choice, generator: torch.Generator) -> Tensor:
    """One id for each row of `logits` (B, V)."""
    if choice.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(probabilities(logits, choice), 1, generator=generator).squeeze(1)


def probabilities(logits: Tensor, choice: Choice) -> Tensor:
    """(B, V): softmax of logits / temperature over the top_k likeliest, then over the smallest set that holds top_p."""
    logits = logits / choice.temperature
    if 0 < choice.top_k < logits.size(-1):
        smallest_kept = logits.topk(choice.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if choice.top_p < 1:
        # Nucleus sampling (Holtzman et al. 2020): a token stays while those before it hold less than top_p.
        sorted_logits, order = logits.sort(descending=True)
        sorted_probabilities = F.softmax(sorted_logits, dim=-1)
        held_before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, held_before >= choice.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return F.softmax(logits, dim=-1)
