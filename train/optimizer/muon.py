"""Muon (Jordan 2024) for the matrices of the blocks, AdamW for everything else.

A matrix is updated by its momentum with all singular values brought near 1. The update is scaled to
the usual size of AdamW's (Liu et al. 2025), so that one learning rate and one weight decay serve both.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.model.sharding import part
from train.optimizer.adamw import AdamW
from train.optimizer.shares import over_ranks

MOMENTUM = 0.95
# Jordan's quintic: the steepest at 0 whose iterates stay in about [0.7, 1.2]. Five steps bring singular
# values from 0.01 up there.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
EPSILON = 1e-7
UPDATE_RMS = 0.2  # of AdamW's updates before the learning rate, usually 0.2 to 0.4


class Muon(torch.optim.Optimizer):
    """`stacks`: matrices of one shape each, and into how many equal blocks of rows each of them is
    split: a block is a matrix of its own, as in a fused matrix of queries, keys and values.
    """

    def __init__(self, stacks: Sequence[tuple[list[Tensor], int]], weight_decay: float, rest: AdamW) -> None:
        groups = [{"params": stack, "blocks": blocks} for stack, blocks in stacks]
        super().__init__(groups, {"lr": rest.defaults["lr"], "weight_decay": weight_decay})
        self.stacks, self.rest = list(self.param_groups), rest
        # One optimizer to whoever looks from outside: the same dictionaries, not copies.
        self.param_groups += rest.param_groups
        self.matrices, rest.state = {matrix for stack, _ in stacks for matrix in stack}, self.state

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state before its first step."""
        if parameter in self.matrices:
            return {"momentum_buffer": torch.zeros_like(parameter)}
        return self.rest.initial_state(parameter)

    @torch.no_grad()
    def step_unless(self, rejected: Tensor) -> None:
        """Update the parameters unless `rejected`, () on their device, is true; the host does not wait."""
        self.rest.step_unless(rejected)
        for group in self.stacks:
            self._update(group, rejected)

    def _update(self, group: dict[str, Any], rejected: Tensor) -> None:
        """A step of n matrices of one shape, in few operations: each takes a small model longer to
        start than to run.
        """
        parameters = group["params"]
        for parameter in parameters:
            self.state[parameter] = self.state[parameter] or self.initial_state(parameter)
        momenta = [part(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        momentum = torch.stack(momenta)
        # The gradient of a rejected step may be NaN. Momentum that moves towards itself stays, to the bit.
        gradient = torch.where(rejected, momentum, torch.stack([part(parameter.grad) for parameter in parameters]))
        torch._foreach_copy_(momenta, momentum.lerp_(gradient, 1 - MOMENTUM).unbind())
        (rows, columns), blocks = parameters[0].shape, group["blocks"]

        def compute(matrices: Tensor) -> Tensor:
            return orthogonalised(matrices.reshape(-1, rows // blocks, columns)).reshape(matrices.shape)

        update = over_ranks(gradient.lerp_(momentum, MOMENTUM), parameters[0], compute)  # Nesterov's
        scale = group["lr"] * UPDATE_RMS * math.sqrt(max(rows // blocks, columns))
        weights = [part(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, torch.where(rejected, 1.0, 1 - group["lr"] * group["weight_decay"]))
        torch._foreach_add_(weights, (update.float() * torch.where(rejected, 0.0, -scale)).unbind())


def orthogonalised(matrices: Tensor) -> Tensor:
    """(n, R, C) with the same singular vectors and all singular values near 1, by Newton-Schulz
    iterations on the smaller of each matrix's two Gram matrices; in bfloat16 on CUDA.
    """
    # The singular values need no more than bfloat16, which a CPU without units for it takes 20 times as long for.
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    # Fewer FLOPs from this ratio of sides on, but squared singular values need float32.
    by_gram = x.dtype == torch.float32 and 2 * x.size(2) > 3 * x.size(1)
    x = torch.bmm(_factor(torch.bmm(x, x.mT)), x) if by_gram else _iterated(x)
    return x.mT if is_tall else x


def _iterated(x: Tensor) -> Tensor:
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, polynomial, x, beta=linear)
    return x


def _factor(gram: Tensor) -> Tensor:
    """(n, R, R) by which all iterations together multiply the matrices with these Gram matrices: every
    one multiplies by a polynomial of `gram`, and those commute. Takes 0.55 of the time where C = 4 R,
    and is off by up to 2e-4, where bfloat16 is by 1e-2.
    """
    linear, cubic, quintic = COEFFICIENTS

    def polynomial(gram: Tensor) -> Tensor:
        found = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        found.diagonal(dim1=1, dim2=2).add_(linear)
        return found

    factor = last = polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = torch.bmm(torch.bmm(last, gram), last)
        last = polynomial(gram)
        factor = torch.bmm(last, factor)
    return factor
