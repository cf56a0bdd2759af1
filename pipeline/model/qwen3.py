"""Qwen3 (Yang et al. 2025): RMSNorm, rotary positions, normalised queries and keys, SwiGLU, grouped
queries, no biases. Parameters have Hugging Face's names.

Shapes: B sequences, T tokens, C = n_embd, H heads of queries, K of keys and values, D per head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.keys import ModelConfig
from pipeline.model.architecture import Block, Body, DecodingSteps
from pipeline.model.attention import causal_attention, positions_and_scope
from pipeline.model.cache import Cache, attend
from pipeline.model.constants import RMS_NORM_EPSILON, swiglu_width
from pipeline.model.products import Operation, product


class NormOnCPU(torch.autograd.Function):
    """F.rms_norm in float32 and returned in `dtype`. torch has no kernel of its backward pass on a CPU:
    750 us forward and backward for 1,024 rows of 128, here 300, as layer norm's kernel does most of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPSILON)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, gain, means = grad.float().contiguous(), weight.float(), torch.zeros_like(scale)
        of_x, of_gain, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.float(), gain.shape, means, scale, gain, None, [True, True, False]
        )
        # Layer norm of means 0, but for what it subtracts: the mean of the gradient.
        of_x.add_((grad @ gain).unsqueeze(-1).mul_(scale / gain.numel()))
        return of_x.to(x.dtype), of_gain.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Over the last dimension, with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        # In autocast's type: each product that reads it would make a copy of its own.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if device == "cpu":
            out: Tensor = NormOnCPU.apply(x, self.weight, dtype)  # type: ignore[no-untyped-call]
            return out
        # Both in the wider type: sharded gains may arrive in bfloat16 next to a float32 residual stream, queries
        # and keys next to float32 gains. Of two types torch makes half a dozen kernels where it has one.
        wide = torch.promote_types(self.weight.dtype, x.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), RMS_NORM_EPSILON).to(dtype)

    def operation(self, dtype: torch.dtype) -> Operation:
        weight = self.weight.detach().to(dtype)
        return partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=RMS_NORM_EPSILON)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the pairs (i, i + D / 2) of x (B, T, heads, D) by the angles of their positions in `rotary`
    (2, T, 1, D) or (2, B, T, 1, D), cosines and signed sines.
    """
    cosines, sines = rotary
    return torch.addcmul(x * cosines, x.roll(x.size(-1) // 2, dims=-1), sines)


class Attention(nn.Module):
    """Causal self-attention: H / K heads of queries share one of keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width, self.dropout = config.head_width, config.dropout
        queries, keys = config.n_head * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nn.Linear(config.n_embd, queries, bias=False)
        self.k_proj = nn.Linear(config.n_embd, keys, bias=False)
        self.v_proj = nn.Linear(config.n_embd, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.n_embd, bias=False)
        self.q_norm, self.k_norm = RMSNorm(config.head_width), RMSNorm(config.head_width)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor, scope: Tensor | None) -> Tensor:
        query, key, value = (
            linear(x).unflatten(2, (-1, self.head_width)) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(self.q_norm(query), rotary), rotate(self.k_norm(key), rotary)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(query, key, value, scope=scope, dropout=dropout)
        out: Tensor = self.resid_dropout(self.o_proj(y.transpose(1, 2).flatten(2)))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = swiglu_width(config)
        self.gate_proj = nn.Linear(config.n_embd, width, bias=False)
        self.up_proj = nn.Linear(config.n_embd, width, bias=False)
        self.down_proj = nn.Linear(width, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))
        return out


class Layer(Block):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.input_layernorm = RMSNorm(config.n_embd)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd)
        self.mlp = MLP(config)

    def branches(self, x: Tensor, *context: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x

    def decoding_step(self, dtype: torch.dtype, rows: int, rotary: Tensor) -> Callable[[Tensor, Cache, Tensor], Tensor]:
        """`branches` on T tokens of each row that follow those in the cache."""
        attn, mlp = self.self_attn, self.mlp
        before, between, q_norm, k_norm = (
            norm.operation(dtype)
            for norm in (self.input_layernorm, self.post_attention_layernorm, attn.q_norm, attn.k_norm)
        )
        q_proj, k_proj, v_proj, o_proj, gate, up, down = (
            product(linear, dtype, rows)
            for linear in (
                attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
            )
        )  # fmt: skip

        def step(x: Tensor, cache: Cache, positions: Tensor) -> Tensor:
            B, T, _ = x.shape
            normed = before(x)
            query, key, value = (
                project(normed).view(B, T, -1, attn.head_width) for project in (q_proj, k_proj, v_proj)
            )
            angles = rotary.index_select(1, positions)
            query, key = rotate(q_norm(query), angles), rotate(k_norm(key), angles)
            x = x + o_proj(attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), cache))
            normed = between(x)
            return x + down(F.silu(gate(normed)) * up(normed))

        return step


class Qwen3(Body):
    """Rotary positions in each layer, and a final norm."""

    rotary: Tensor  # (2, block_size, 1, D), float32

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__(config, padded_vocab_size)
        self.embed_tokens = nn.Embedding(padded_vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.register_buffer("rotary", torch.empty(2, config.block_size, 1, config.head_width), persistent=False)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def cache_heads(self) -> tuple[int, int]:
        return self.config.kv_heads, self.config.head_width

    def fill_buffers(self) -> None:
        device, half = self.rotary.device, self.config.head_width // 2
        inverse = self.config.rope_theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.arange(self.config.block_size, device=device).unsqueeze(1) * inverse
        cosines, sines = angles.cos(), angles.sin()
        # The first half of a head gets the second one's negative, as `roll` brings it.
        tables = torch.cat((cosines, cosines), 1), torch.cat((-sines, sines), 1)
        self.rotary.copy_(torch.stack(tables).unsqueeze(2))

    def init_weights(self, module: nn.Module) -> None:
        """What writes into the residual stream is zero, so that every block begins as the identity."""
        super().init_weights(module)
        if isinstance(module, Attention | MLP):
            nn.init.zeros_((module.o_proj if isinstance(module, Attention) else module.down_proj).weight)

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        positions, scope = positions_and_scope(ids, documents)
        rotary = self.rotary[:, positions]
        x = self.drop(self.residual(self.embed_tokens(ids)))
        for layer in self.layers:
            x = layer(x, rotary, scope)
        out: Tensor = self.norm(x)
        return out

    def decoding_steps(self, dtype: torch.dtype, rows: int) -> DecodingSteps:
        tokens, rotary = self.embed_tokens.weight.detach().to(dtype), self.rotary.to(dtype)

        def embed(ids: Tensor, positions: Tensor) -> Tensor:
            return F.embedding(ids, tokens)

        layers = [cast(Layer, layer).decoding_step(dtype, rows, rotary) for layer in self.layers]
        return DecodingSteps(embed, layers, self.norm.operation(dtype))
