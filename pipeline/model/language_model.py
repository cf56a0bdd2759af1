"""The language model around an architecture's blocks: padded vocabulary, head, loss, counts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.gpt2 import INIT_STD, MLP, Attention, Transformer

VOCAB_MULTIPLE = 64  # matrix units work in tiles; GPT-2's 50,257 columns become 50,304


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
