"""Next-token logits at the speed at which a machine can read the weights.

The arithmetic of the model, with the keys and values of earlier tokens cached, and without what a
model in training carries along: for one token of GPT-2 124M modules cost 2 ms of 20 on two cores.

Shapes: S samples, B rows (1 or S), T tokens, V = vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.machine.device import check_memory
from pipeline.model.cache import FilledCache, MaskedCache
from pipeline.model.captured import captured
from pipeline.model.language_model import LanguageModel, all_finite, damaged_weights
from pipeline.model.products import product

# Devices whose steps are of one shape, so that a graph can be captured.
ONE_SHAPE = ("cuda",)
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Decoder:
    """S continuations: `prefill` reads the text before them, each `step` one more token of every
    one.

    Memory for keys and values is allocated once; of block_size tokens, `length` are filled. Raises
    UserError for more samples than the device has memory for, and on the way to the host where logits
    are not finite.
    """

    def __init__(self, model: LanguageModel, samples: int, dtype: torch.dtype = torch.float32) -> None:
        body, config = model.transformer, model.config
        self.samples, self.block_size, self.length = samples, config.block_size, 0
        self.vocab_size, self.device = model.vocab_size, model.lm_head.weight.device
        heads, width = body.cache_heads
        shape = (2, samples, heads, config.block_size, width)
        needed = config.n_layer * math.prod(shape) * dtype.itemsize
        check_memory(self.device, needed, f"keys and values of {samples:,} samples", "ask for fewer samples")
        self.positions = torch.arange(config.block_size, device=self.device)
        self.steps = body.decoding_steps(dtype, samples)
        self.head = product(model.lm_head, dtype, samples)
        # Of the token that a step reads, where steps are of one shape: see MaskedCache.
        self.position, self.visible = self.positions[:1].clone(), self.positions == 0
        self.caches: list[FilledCache] = [FilledCache(shape, dtype, self.device) for _ in body.blocks]
        if self.device.type in ONE_SHAPE:
            shared = {"position": self.position, "visible": self.visible}
            self.caches = [MaskedCache(shape, dtype, self.device, **shared) for _ in body.blocks]
        self._step: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self._finite = torch.ones((), dtype=torch.bool)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits (S, V) after a text, ids (1, T) where all samples share it, else (S, T). Forgets
        earlier text.
        """
        for cache in self.caches:
            cache.clear()
        self.length = ids.size(1)
        self._move_to(0)
        logits, self._finite = self._next_logits(ids, self.positions[: self.length])
        # The shared text was read once, in the first row: every sample starts from a copy.
        if len(ids) < self.samples:
            for cache in self.caches:
                cache.share_first_row()
        return logits.expand(self.samples, -1)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (S, V) after one more token per sample, ids (S,), until the next step. Needs `length` <
        block_size.
        """
        start, self.length = self.length, self.length + 1
        if self.device.type not in ONE_SHAPE:
            logits, self._finite = self._next_logits(ids.unsqueeze(1), self.positions[start : self.length])
            return logits
        self._move_to(start)
        if self._step is None:
            self._step = captured(lambda ids: self._next_logits(ids.unsqueeze(1), self.position), ids)
        logits, self._finite = self._step(ids)
        return logits

    def to_host(self, ids: Tensor) -> list[int]:
        """Ids (S,) chosen from the last logits, in one transfer from the device. Raises UserError unless
        all of these logits are finite.
        """
        *found, finite = torch.cat([ids.flatten(), self._finite.view(1)]).tolist()
        if not finite:
            raise damaged_weights()
        return found

    def _move_to(self, position: int) -> None:
        self.position.fill_(position)
        torch.le(self.positions, self.position, out=self.visible)

    def _next_logits(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, V) after ids (B, T) at `positions` (T,), which follow those in the first B rows of
        the caches; and whether all are finite.
        """
        with attention_kernels(self.device):
            x = self.steps.embed(ids, positions)
            for block, cache in zip(self.steps.blocks, self.caches, strict=True):
                x = block(x, cache, positions)
        # Only the last position has a next token to predict.
        logits = self.head(self.steps.norm(x[:, -1]))
        return logits[:, : self.vocab_size].float(), all_finite(logits)


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Those that decoding may use: on a GPU all but cuDNN's, which torch prefers on an H100 and which
    takes some 30 ms for a plan whenever the number of keys is a new one.
    """
    return sdpa_kernel(WITHOUT_PLANS) if device.type == "cuda" else nullcontext()
