"""GPT-2 (Radford et al. 2019), with Hugging Face's parameter names.

Shapes: B sequences, T tokens, C = n_embd, H heads, D = C / H per head, V = vocabulary, P = V padded to a multiple of 64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config.keys import ModelConfig

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02


class LayerNorm(nn.LayerNorm):
    """Gains and biases in the type of the input: sharded ones may arrive in bfloat16, beside a float32 residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        out: Tensor = self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))
        return out


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))
        return out


class Block(nn.Module):
    """Pre-norm: each branch reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing == "block"
        self.ln_1 = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.branches, x, mask, use_reentrant=False)
            return out
        return self.branches(x, mask)

    def branches(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Everything below the output head, under the name Hugging Face gives it."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        positions = torch.arange(ids.size(1), device=ids.device)
        mask = None
        if documents is not None:
            mask = _document_mask(documents)
            positions = mask.sum(dim=3).squeeze(1) - 1
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            x = block(x, mask)
        out: Tensor = self.ln_f(x)
        return out


def _document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may look: at itself and at those before it in its own document."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()
