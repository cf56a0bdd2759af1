"""Next-token logits at the speed at which a machine can read the weights.

The arithmetic of the model, with the keys and values of earlier tokens cached, and without what a
model in training carries along: for one token of GPT-2 124M modules cost 2 ms of 20 on two cores.

Shapes: S samples, B rows (1 or S), T tokens, V = vocabulary.
"""

import math

import torch
from torch import Tensor

from pipeline.machine.device import check_memory
from pipeline.model.cache import FilledCache
from pipeline.model.language_model import LanguageModel, finite
from pipeline.model.products import product


class Decoder:
    """S continuations: `prefill` reads the text before them, each `step` one more token of every
    one.

    Memory for keys and values is allocated once; of block_size tokens, `length` are filled. Raises
    UserError for more samples than the device has memory for, and where logits are not finite.
    """

    def __init__(self, model: LanguageModel, samples: int, dtype: torch.dtype = torch.float32) -> None:
        body, config = model.transformer, model.config
        self.samples, self.block_size, self.length = samples, config.block_size, 0
        self.vocab_size, self.device = model.vocab_size, model.lm_head.weight.device
        heads, width = body.cache_heads
        shape = (2, samples, heads, config.block_size, width)
        needed = config.n_layer * math.prod(shape) * dtype.itemsize
        check_memory(self.device, needed, f"keys and values of {samples:,} samples", "ask for fewer samples")
        self.caches = [FilledCache(shape, dtype, self.device) for _ in body.blocks]
        self.positions = torch.arange(config.block_size, device=self.device)
        self.steps = body.decoding_steps(dtype, samples)
        self.head = product(model.lm_head, dtype, samples)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits (S, V) after a text, ids (1, T) where all samples share it, else (S, T). Forgets
        earlier text.
        """
        self.length = 0
        for cache in self.caches:
            cache.clear()
        logits = self._next_logits(ids)
        # The shared text was read once, in the first row: every sample starts from a copy.
        if len(ids) < self.samples:
            for cache in self.caches:
                cache.share_first_row()
        return logits.expand(self.samples, -1)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (S, V) after one more token per sample, ids (S,). Needs `length` < block_size."""
        return self._next_logits(ids.unsqueeze(1))

    def _next_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after ids (B, T), which follow the `length` tokens in the first B rows of
        the caches.
        """
        start, self.length = self.length, self.length + ids.size(1)
        positions = self.positions[start : self.length]
        x = self.steps.embed(ids, positions)
        for block, cache in zip(self.steps.blocks, self.caches, strict=True):
            x = block(x, cache, positions)
        # Only the last position has a next token to predict.
        return finite(self.head(self.steps.norm(x[:, -1])))[:, : self.vocab_size].float()
