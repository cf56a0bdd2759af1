"""The causal language model around an architecture's body: padded vocabulary, output head, loss,
counts.

Shapes: B sequences, T tokens, C = n_embd, V = vocabulary, P = V padded to a multiple of 64.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.architecture import Body
from pipeline.model.constants import VOCAB_MULTIPLE
from pipeline.model.gpt2 import GPT2
from pipeline.model.loss import loss_and_gradient, mean_loss, token_losses
from pipeline.model.qwen3 import Qwen3

# By `model.arch`.
ARCHITECTURES: dict[str, type[Body]] = {"gpt2": GPT2, "qwen3": Qwen3}


class Unfilled(TorchFunctionMode):
    """Leaves tensors as they are where torch.nn.init would fill them. On the meta device there is nothing
    to fill, and the first random number there imports the compiler: 2 s of each command's start.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fills = getattr(func, "__module__", None) == nn.init.__name__
        return (kwargs or {})["tensor"] if fills else func(*args, **(kwargs or {}))


class LanguageModel(nn.Module):
    """Token ids (B, T) in, next-token logits or their mean cross-entropy out.

    The vocabulary is padded to P inside. A padded id has the logit -inf, so its probability is
    exactly 0: it cannot be sampled, it adds nothing to the loss, and its row gets no gradient.
    `state_dict` keys carry the padding; the checkpoint leaves it out.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.differentiate = loss_and_gradient  # compiled where the blocks are
        self.padded_vocab_size = rows = math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.transformer = ARCHITECTURES[config.arch](config, rows)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.logit_bias: Tensor | None
        self.register_buffer("logit_bias", torch.empty(rows) if rows > vocab_size else None, persistent=False)
        # Children come before their parents, so a block may rescale what its matrices drew.
        self.apply(self.transformer.init_weights)
        self.tie_and_mask()
        self.zero_padding()

    @classmethod
    def without_memory(cls, config: ModelConfig, vocab_size: int) -> Self:
        """A model on the meta device: shapes and types alone."""
        with torch.device("meta"), Unfilled():
            return cls(config, vocab_size)

    @classmethod
    def uninitialised(cls, config: ModelConfig, vocab_size: int) -> Self:
        """A model on the CPU whose weights are about to be read: drawing random ones would take
        seconds at 1558M.
        """
        model = cls.without_memory(config, vocab_size)
        model.allocate(torch.device("cpu"))
        return model

    def allocate(self, device: torch.device) -> None:
        """Give a model without memory, or the shards of one, uninitialised weights on `device`."""
        self.to_empty(device=device)
        self.tie_and_mask()

    def compile_blocks(self) -> None:
        """Compile one block's forward pass, which all others share, and the loss: for 12 layers that takes
        seconds where the model as one graph takes a minute, and gradients arrive block by block, so that
        DDP averages those of one while the next computes.
        """
        # DDP's optimizer would split a block once more, where a bucket ends inside of it.
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks:
            # Not the module: what FSDP does around it cannot be traced.
            block.forward = torch.compile(block.forward)
        self.differentiate = torch.compile(self.differentiate)

    @property
    def blocks(self) -> nn.ModuleList:
        """The architecture's layers, which are sharded and compiled one by one."""
        return self.transformer.blocks

    @property
    def fused(self) -> Mapping[str, int]:
        """Endings of the names of matrices that are several in one, and how many."""
        return self.transformer.fused

    def tie_and_mask(self) -> None:
        """Tie the head, give the padding rows the logit -inf, and fill the body's buffers; again
        wherever memory was replaced.
        """
        self.transformer.fill_buffers()
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.token_embedding.weight
        if self.logit_bias is not None:
            # Added by the same matrix product that makes the logits, so masking the padding costs
            # nothing.
            self.logit_bias.zero_()[self.vocab_size :] = -torch.inf

    @torch.no_grad()
    def zero_padding(self) -> None:
        """A checkpoint leaves the padding rows out, and a resume has them zero."""
        self.transformer.token_embedding.weight[self.vocab_size :] = 0
        self.lm_head.weight[self.vocab_size :] = 0

    def forward(self, ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats of predicting `targets` (B, T) from `ids` (B, T): a float32
        scalar.

        Tokens of different `documents`, by number (B, T) or offset (n,), do not see each other, and
        positions count from 0 in each. Rows of `ids` past the last row of `targets` are not counted.
        """
        hidden = self.transformer(ids, documents)[: len(targets)].flatten(0, 1)
        return mean_loss(
            hidden, self.lm_head.weight, self.logit_bias, targets.flatten(), differentiate=self.differentiate
        )

    def token_losses(self, ids: Tensor, targets: Tensor, documents: Tensor | None, where: Tensor) -> Tensor:
        """(n,) cross-entropy of the n `targets` (B, T) that `where` (B, T) marks, without gradients.

        Raises UserError unless all are finite: then no logit was NaN.
        """
        hidden = self.transformer(ids, documents)[where]
        return finite(token_losses(hidden, self.lm_head.weight, self.logit_bias, targets[where]))

    def logits(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Float32 logits (B, T, V) after every token of `ids`."""
        logits: Tensor = self.lm_head(self.transformer(ids, documents))
        return logits[..., : self.vocab_size].float()


def document_numbers(ids: Tensor, end_of_text: int) -> Tensor:
    """(B, T), the number of each token's document in its window.

    An end-of-text token opens a document here, even where the shards have it at the end of the
    previous one: as a target it is predicted from the document it ends, as an input it is what
    `sample` starts a text from.
    """
    return (ids == end_of_text).cumsum(dim=1)


def finite(logits: Tensor) -> Tensor:
    """The logits themselves. Raises UserError unless all are finite: text sampled from NaN looks
    like a result.
    """
    if not all_finite(logits):
        raise damaged_weights()
    return logits


def all_finite(logits: Tensor) -> Tensor:
    """() bool, on the device."""
    # In a tenth of the time that logits.isfinite().all() takes: 0.01 ms for GPT-2's 50,257.
    return torch.stack(logits.aminmax()).isfinite().all()


def damaged_weights() -> UserError:
    return UserError("the model's logits are not finite, so its weights are damaged: use another checkpoint")
