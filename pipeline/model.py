"""GPT-2 (Radford et al. 2019), with Hugging Face's parameter names.

Shapes: B sequences, T tokens, C = n_embd, H heads, D = C / H per head, V = vocabulary, P = V padded to a multiple of 64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import ModelConfig
from pipeline.errors import UserError

VOCAB_MULTIPLE = 64  # matrix units work in tiles; GPT-2's 50,257 columns become 50,304
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
        logits = F.linear(self.transformer(ids, documents), self.lm_head.weight, self.logit_bias)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def logits(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) after every token of `ids`."""
        logits: Tensor = self.lm_head(self.transformer(ids, documents))
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


def document_numbers(ids: Tensor, end_of_text: int) -> Tensor:
    """(B, T), the number of each token's document in its window.

    End-of-text opens a document here, also where the shards have it at the end of the one before: as a target it is
    predicted from the document it ends, as an input it is what `sample` starts a text from.
    """
    return (ids == end_of_text).cumsum(dim=1)


def finite(logits: Tensor) -> Tensor:
    """The logits themselves. Raises UserError unless all are numbers: what is made of others looks like a result."""
    # In a tenth of the time that logits.isfinite().all() takes: 0.01 ms for GPT-2's 50,257.
    if not torch.stack(logits.aminmax()).isfinite().all():
        raise UserError("the model's logits are not finite, so its weights are damaged: take another checkpoint")
    return logits


def _document_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may look: at itself and at those before it in its own document."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()
