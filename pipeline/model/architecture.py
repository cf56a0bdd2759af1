"""What an architecture provides: the body between token ids and hidden states, and how the decoder
runs it.

A new architecture is one file that subclasses `Body`, an entry in `ARCHITECTURES`
(language_model.py), in the choices of `model.arch`, and a `Layout` for its Hugging Face folder
(pipeline/checkpoint/layout.py).

Shapes: B sequences, T tokens, C = n_embd, S samples, P = padded vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.keys import ModelConfig
from pipeline.model.cache import Cache
from pipeline.model.constants import INIT_STD


@dataclass(frozen=True)
class DecodingSteps:
    """A body's operations without autograd: `embed`, then each of `blocks` with its own cache, then
    `norm`.

    embed(ids (B, T), positions) and block(x (B, T, C), cache, positions) take T tokens at
    `positions` (T,), int64 on the device, which follow those in the cache.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    blocks: Sequence[Callable[[Tensor, Cache, Tensor], Tensor]]
    norm: Callable[[Tensor], Tensor]


class Block(nn.Module, ABC):
    """Pre-norm: each branch reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing == "block"

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        # Keeps x alone and runs `branches` again in the backward pass, with the same dropout masks.
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.branches, x, *context, use_reentrant=False)
            return out
        return self.branches(x, *context)

    @abstractmethod
    def branches(self, x: Tensor, *context: Tensor | None) -> Tensor:
        """x (B, T, C) with both branches added; `context`: what all blocks share, such as a mask."""


class Body(nn.Module, ABC):
    """A decoder-only transformer below the output head: ids (B, T) -> hidden states (B, T, C)."""

    # Endings of the names of a block's matrices that are several of equal height, one on the other,
    # and of how many: Muon updates each apart.
    fused: ClassVar[Mapping[str, int]] = MappingProxyType({})

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def token_embedding(self) -> nn.Embedding:
        """(P, C): shared with the output head where weights are tied."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers, which are sharded and compiled one by one."""

    @property
    @abstractmethod
    def cache_heads(self) -> tuple[int, int]:
        """How many heads of keys and values a block caches, and the width of each."""

    @abstractmethod
    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Tokens of different `documents` must not see each other, and positions count from 0 in each:
        the number of each token's document (B, T), or offsets (n,). `positions_and_scope` and
        `causal_attention` (attention.py) know both.
        """

    @abstractmethod
    def decoding_steps(self, dtype: torch.dtype, rows: int) -> DecodingSteps:
        """The operations in `dtype`, with weights laid out for `rows` rows at a time."""

    def residual(self, x: Tensor) -> Tensor:
        """Embeddings (B, T, C) as the residual stream that blocks add to: float32, which autocast leaves
        as it is, or with model.residual_dtype=autocast the type of the matrix products.
        """
        kind = x.device.type
        if self.config.residual_dtype == "float32" or not torch.is_autocast_enabled(kind):
            return x
        return x.to(torch.get_autocast_dtype(kind))

    def fill_buffers(self) -> None:
        """Write what buffers hold; called again wherever memory was replaced."""

    def init_weights(self, module: nn.Module) -> None:
        """Initialise one module of the model: N(0, 0.02), biases zero. Called for every module,
        children first.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may look: at itself and at earlier tokens of its document."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()
