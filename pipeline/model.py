"""GPT-2 (Radford et al. 2019), with Hugging Face's parameter names.

Shapes: B sequences, T tokens, C = n_embd, H heads, D = C / H per head, V = vocabulary, P = V padded to a multiple of 64.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig

VOCAB_MULTIPLE = 64  # matrix units work in tiles; GPT-2's 50,257 columns become 50,304
LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far: one (B, H, block_size, D) pair a layer, of which `length` tokens are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @classmethod
    def empty(cls, model: "GPT", batch_size: int) -> "KeyValueCache":
        config, weight = model.config, model.transformer.wte.weight
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        layers = range(config.n_layer)
        return cls([weight.new_empty(shape) for _ in layers], [weight.new_empty(shape) for _ in layers])

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the (B, H, T, D) keys and values of T new tokens; returns those of every token so far."""
        end = self.length + key.size(2)
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class LayerNorm(nn.LayerNorm):
    """Gains and biases in the type of the input: sharded ones may arrive in bfloat16, beside a float32 residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2)
        )
        seen = cache.length if cache else 0
        if cache:
            key, value = cache.append(self.layer, key, value)
        if mask is None and seen and T > 1:
            mask = _causal_mask(T, seen, x.device)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=T > 1 and not seen and mask is None,
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

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.recompute = config.activation_checkpointing == "block"
        self.ln_1 = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None, mask: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.branches, x, cache, mask, use_reentrant=False)
            return out
        return self.branches(x, cache, mask)

    def branches(self, x: Tensor, cache: KeyValueCache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Everything below the output head, under the name Hugging Face gives it."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)

    def forward(self, ids: Tensor, cache: KeyValueCache | None, documents: Tensor | None = None) -> Tensor:
        seen = cache.length if cache else 0
        positions = torch.arange(seen, seen + ids.size(1), device=ids.device)
        mask = None
        if documents is not None:
            mask = _document_mask(documents)
            positions = mask.sum(dim=3).squeeze(1) - 1
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            x = block(x, cache, mask)
        if cache:
            cache.length += ids.size(1)
        out: Tensor = self.ln_f(x)
        return out


class GPT(nn.Module):
    """The language model: ids (B, T) in, next-token logits or their mean cross-entropy out.

    The vocabulary is padded to P inside. A padded id has the logit -inf, so its probability is exactly 0: it cannot be
    sampled, it adds nothing to the loss, and its row gets no gradient. `state_dict` keys carry the padding; the checkpoint
    leaves it out.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        padded_vocab_size = math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.transformer = Transformer(config, padded_vocab_size)
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        self.logit_bias: Tensor | None
        padding = padded_vocab_size > vocab_size
        self.register_buffer("logit_bias", torch.empty(padded_vocab_size) if padding else None, persistent=False)
        self.apply(self._init_weights)
        self.tie_and_mask()

    def tie_and_mask(self) -> None:
        """Tie the head, zero the padding rows and give them the logit -inf; once more where memory was replaced."""
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        with torch.no_grad():
            self.transformer.wte.weight[self.vocab_size :] = 0
            self.lm_head.weight[self.vocab_size :] = 0
            if self.logit_bias is not None:
                # Added by the same matrix product that makes the logits, so masking the padding costs nothing.
                self.logit_bias.zero_()[self.vocab_size :] = -torch.inf

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); what writes into the residual stream is scaled by 1/sqrt(its 2 n_layer additions)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):
            nn.init.normal_(module.c_proj.weight, std=INIT_STD / math.sqrt(2 * self.config.n_layer))

    def forward(self, ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats of predicting `targets` (B, T) from `ids` (B, T): a float32 scalar.

        Tokens with different numbers in `documents` (B, T) do not see each other, and positions count from 0 in each.
        """
        logits = F.linear(self.transformer(ids, None, documents), self.lm_head.weight, self.logit_bias)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def next_logits(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, V) of the token after `ids` (B, T). With a cache, `ids` holds only what the cache has not seen."""
        last = self.transformer(ids, cache)[:, -1]
        logits: Tensor = self.lm_head(last)
        return logits[:, : self.vocab_size].float()

    def logits(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) after every token of `ids`."""
        logits: Tensor = self.lm_head(self.transformer(ids, None, documents))
        return logits[..., : self.vocab_size].float()

    def parameter_count(self) -> int:
        """Trainable numbers, tied ones once and padding rows left out: what the literature calls the model's size."""
        padding_rows = self.lm_head.out_features - self.vocab_size
        matrices = 1 if self.config.tie_weights else 2
        return sum(p.numel() for p in self.parameters()) - matrices * padding_rows * self.config.n_embd

    def flops_per_token(self) -> int:
        """Forward and backward: 6 for each weight that is multiplied, 12 L C T for attention (Chowdhery et al. 2022)."""
        embeddings = self.transformer.wpe.weight.numel()
        if not self.config.tie_weights:
            embeddings += self.vocab_size * self.config.n_embd
        attention = 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * (self.parameter_count() - embeddings) + attention


def _causal_mask(new: int, seen: int, device: torch.device) -> Tensor:
    """(new, seen + new), true where a new token may look: at all seen tokens, at itself and at new ones before it."""
    return torch.ones(new, seen + new, dtype=torch.bool, device=device).tril(diagonal=seen)


def _document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may look: at itself and at those before it in its own document."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()
