"""Cross-entropy of a language model from its hidden states, a few rows at a time.

    hidden (N, C) --chunk of rows--> logits (n, P) --> losses (n,), and with gradients at once
                                                       d logits (n, P) --> d hidden (n, C), d weight (P, C)

Of GPT-2's 50,257 logits a token, float32 ones of a micro-batch take more memory than all the rest of
a step, three times over in `F.cross_entropy`'s backward pass. Here those of one chunk exist at a time:
a mean of losses has gradients that are known, up to one factor, before the backward pass begins. The
idea is Liger Kernel's (Hsu et al. 2024, arXiv 2410.10989).

Shapes: N tokens, C = n_embd, P = padded vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.model.constants import chunk_count

HEADROOM = 64  # in float16, of the gradient of the head's weight


def loss_and_gradient(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """() sum of the losses of `ids` (n, 1) under `logits` (n, P), and its gradient by the logits, in their
    type. As one compiled kernel it reads the logits twice and writes the gradient once.
    """
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at_target = log_p.gather(1, ids)
    # p, less 1 at the target: subtracted before p is rounded.
    gradient = log_p.exp_().to(logits.dtype).scatter_(1, ids, at_target.expm1().to(logits.dtype))
    return -at_target.sum(), gradient


Differentiate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mean_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    differentiate: Differentiate = loss_and_gradient,
) -> Tensor:
    """() mean cross-entropy in nats of `targets` (N,) under the logits hidden @ weight.T + bias.

    hidden (N, C), weight (P, C), bias (P,), which gets no gradient: in the type of autocast, losses
    and their gradients in float32 at least.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _MeanLoss.apply(*(hidden, weight, bias, targets), differentiate)  # type: ignore[no-untyped-call]
        return loss
    return token_losses(hidden, weight, bias, targets).mean()


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """(N,) cross-entropy of each of `targets`, as in `mean_loss`, without gradients."""
    dtype = _product_type(hidden)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        losses = [
            F.cross_entropy(_at_least_float32(F.linear(rows.to(dtype), weight, bias)), ids, reduction="none")
            for rows, ids in _chunks(hidden, targets, len(weight))
        ]
    return torch.cat(losses)


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, differentiate: Differentiate
    ) -> Tensor:
        dtype = _product_type(hidden)
        low, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        d_hidden: list[Tensor] = []
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, ids in _chunks(hidden, targets, len(weight)):
                rows, ids = chunk.to(dtype), ids.unsqueeze(1)
                # Of the sum: the mean's 1/N comes later, as float16 would lose what is that small.
                loss, d_logits = differentiate(F.linear(rows, low, low_bias), ids)
                total += loss
                if ctx.needs_input_grad[0]:
                    d_hidden.append(d_logits @ low)
                if d_weight is not None:
                    _add_product(d_weight, d_logits.t(), rows)
                del d_logits  # or they would live next to the next chunk's logits
        ctx.save_for_backward(torch.cat(d_hidden) if d_hidden else None, d_weight)
        ctx.tokens, ctx.hidden_type = len(targets), hidden.dtype
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss / ctx.tokens  # with autocast's float16 the scaler's factor too
        return (
            None if d_hidden is None else d_hidden.to(ctx.hidden_type) * scale,
            None if d_weight is None else d_weight * scale,
            None, None, None,
        )  # fmt: skip


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, a sum of chunks that stays float32 where the factors are not."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.dtype == torch.float16:
        # A sum over a frequent token's many rows may pass the largest number, 65,504, and no loss scale is in
        # it that could fall. A power of two rounds nothing.
        total.add_(left @ (right / HEADROOM), alpha=HEADROOM)
    else:
        total.add_(left @ right)


def _chunks(hidden: Tensor, targets: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both, as CHUNK_LOGITS asks."""
    count = chunk_count(len(targets), vocab_size, on_cpu=hidden.device.type == "cpu")
    return zip(hidden.detach().chunk(count), targets.chunk(count), strict=True)


def _product_type(hidden: Tensor) -> torch.dtype:
    """What autocast would multiply `hidden` in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
