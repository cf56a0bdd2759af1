"""GPT-2 (Radford et al. 2019), with Hugging Face's parameter names.

Shapes: B sequences, T tokens, C = n_embd, H heads, D = C / H per head, S samples.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.keys import ModelConfig
from pipeline.model.architecture import Block, Body, DecodingSteps
from pipeline.model.attention import causal_attention, positions_and_scope
from pipeline.model.cache import Cache, attend
from pipeline.model.constants import INIT_STD, LAYER_NORM_EPSILON
from pipeline.model.products import layer_norm, product


class LayerNorm(nn.LayerNorm):
    """Gains and biases in no narrower type than the input: sharded ones may arrive in bfloat16, next
    to a float32 residual stream.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), bias=bias, eps=self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        # Queries, keys and values by one product: one large matrix multiplies faster than three.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, scope: Tensor | None) -> Tensor:
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(query, key, value, scope=scope, dropout=dropout)
        out: Tensor = self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 was trained with the tanh approximation of GELU.
        out: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))
        return out


class Layer(Block):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.ln_1 = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)
        self.mlp = MLP(config)

    def branches(self, x: Tensor, *context: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), *context)
        x = x + self.mlp(self.ln_2(x))
        return x

    def decoding_step(self, dtype: torch.dtype, rows: int) -> Callable[[Tensor, Cache, Tensor], Tensor]:
        """`branches` on T tokens of each row that follow those in the cache."""
        attn, mlp = self.attn, self.mlp
        ln_1, ln_2 = layer_norm(self.ln_1, dtype), layer_norm(self.ln_2, dtype)
        c_attn, attn_c_proj, c_fc, mlp_c_proj = (
            product(linear, dtype, rows) for linear in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
        )

        def step(x: Tensor, cache: Cache, positions: Tensor) -> Tensor:
            B, T, _ = x.shape
            heads = c_attn(ln_1(x)).view(B, T, 3 * attn.n_head, -1).transpose(1, 2)
            query, key, value = heads.chunk(3, dim=1)
            x = x + attn_c_proj(attend(query, key, value, cache))
            return x + mlp_c_proj(F.gelu(c_fc(ln_2(x)), approximate="tanh"))

        return step


class GPT2(Body):
    """Learned positions, pre-norm blocks, and a final norm."""

    fused = MappingProxyType({"c_attn.weight": 3})

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__(config, padded_vocab_size)
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.wte

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.config.n_head, self.config.n_embd // self.config.n_head

    def init_weights(self, module: nn.Module) -> None:
        """What writes into the residual stream is scaled by 1/sqrt(its 2 n_layer additions), as in
        GPT-2.
        """
        super().init_weights(module)
        if isinstance(module, Attention | MLP):
            nn.init.normal_(module.c_proj.weight, std=INIT_STD / math.sqrt(2 * self.config.n_layer))

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        positions, scope = positions_and_scope(ids, documents)
        x = self.drop(self.residual(self.wte(ids) + self.wpe(positions)))
        for block in self.h:
            x = block(x, scope)
        out: Tensor = self.ln_f(x)
        return out

    def decoding_steps(self, dtype: torch.dtype, rows: int) -> DecodingSteps:
        tokens, places = (table.weight.detach().to(dtype) for table in (self.wte, self.wpe))

        # Closures over plain tensors: calling modules would cost a tenth of a token's time.
        def embed(ids: Tensor, positions: Tensor) -> Tensor:
            return F.embedding(ids, tokens) + F.embedding(positions, places)

        blocks = [cast(Layer, block).decoding_step(dtype, rows) for block in self.h]
        return DecodingSteps(embed, blocks, layer_norm(self.ln_f, dtype))
