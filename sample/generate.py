"""The loop that asks for the next token.

The model sees at most `block_size` tokens. When the window is full, its older half is dropped and
the newer half is read again at the first positions, which costs one prefill every block_size / 2
tokens.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from pipeline.model.decoder import Decoder
from sample.choice import choose
from sample.options import Choice

DRAWN_AT_A_TIME = 128  # random numbers of a sample, by one call of torch.rand


class Tokens(NamedTuple):
    """The next id of every sample, and the log-probabilities by the model, if asked for."""

    ids: list[int]
    log_probabilities: list[float]


@torch.inference_mode()
def generate(
    decoder: Decoder, prompt: list[int], *, max_new_tokens: int, choice: Choice, seed: int, scored: bool = False
) -> Iterator[Tokens]:
    """Yields the next token of each sample of the decoder. `prompt` must not be empty.

    Raises UserError if logits are not finite, even at a position that few texts reach.
    """
    block_size = decoder.block_size
    ids = torch.tensor([prompt], device=decoder.device)
    logits = decoder.prefill(ids[:, -block_size:])
    # On the host, where each id goes anyway: a list for each position.
    window = deque(([each] * decoder.samples for each in prompt[-block_size:]), maxlen=block_size)
    seen = None
    if choice.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids.expand(decoder.samples, -1), True)
    numbers = uniforms(seed, decoder.samples, decoder.device)
    for count in range(1, max_new_tokens + 1):
        chosen = choose(logits, choice, seen, next(numbers))
        window.append(decoder.to_host(chosen))
        yield Tokens(window[-1], log_probabilities(logits, chosen).tolist() if scored else [])
        if count == max_new_tokens:
            return
        if seen is not None:
            seen.scatter_(1, chosen.unsqueeze(1), True)
        if decoder.length < block_size:
            logits = decoder.step(chosen)
        else:
            newer = torch.tensor(list(window)[-max(1, block_size // 2) :], device=decoder.device)
            logits = decoder.prefill(newer.t())


def log_probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
    """(B,): natural logarithms of the probabilities of the ids `chosen` (B,) by `logits` (B, V)."""
    return logits.gather(1, chosen.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)


def uniforms(seed: int, samples: int, device: torch.device) -> Iterator[Tensor]:
    """Endless rows (samples,) of random numbers in [0, 1), float64.

    Those of sample i do not depend on the number of samples.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    seeds = [xxhash.xxh3_64_intdigest(b"sample:%d:%d" % (seed, sample)) for sample in range(samples)]
    # Drawn on the CPU, so that a seed gives the same numbers on every device.
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    while True:
        drawn = [torch.rand(DRAWN_AT_A_TIME, generator=generator, dtype=dtype) for generator in generators]
        yield from torch.stack(drawn, dim=1).to(device)
