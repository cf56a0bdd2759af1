"""Which steps reach the weights: none that is not finite and, with train.spike_z_score, no spike of
the gradient norm.

A spike is a gradient norm far above the last ones. Such steps come from certain data in a certain
state of the weights (Chowdhery et al. 2022, section 5.1), so the same samples do no harm later: the
step is skipped, and the run continues with the next samples. What a norm is compared with is saved
in checkpoints, so that a resumed run skips the same steps.
"""

import math
from collections import deque
from collections.abc import Iterable
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from pipeline.config.keys import TrainConfig


class Outcome(Enum):
    """What became of a step: it reached the weights, or why it was skipped."""

    TAKEN = "taken"
    NOT_FINITE = "not finite"
    SPIKE = "spike"
    RESCALED = "float16 overflow"  # of the scaled gradients alone: the next step has a lower scale

    @property
    def is_bad(self) -> bool:
        """Whether the step counts towards train.max_bad_steps."""
        return self not in (Outcome.TAKEN, Outcome.RESCALED)


class StepGuard:
    """Judges steps one after the other. Its state is the last gradient norms and the number of bad
    steps in a row.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.z_score, self.bad_steps = config.spike_z_score, 0
        self._norms: deque[float] = deque(maxlen=config.spike_window)

    @property
    def norms(self) -> list[float]:
        """Gradient norms of the last `spike_window` steps that reached the weights; empty where
        spikes are not looked for.
        """
        return list(self._norms)

    def restore(self, norms: Iterable[float], bad_steps: int) -> None:
        self.bad_steps = bad_steps
        self._norms.clear()
        self._norms.extend(norms if self.z_score else ())

    @property
    def most_norm(self) -> float:
        """The largest gradient norm that is not a spike."""
        # Early norms are large and fall fast: until the window is full there is nothing to compare
        # with.
        if not self.z_score or len(self._norms) < (self._norms.maxlen or 0):
            return math.inf
        # In the precision in which a device compares, so that it decides as the host does.
        return float(np.float32(np.mean(self._norms) + self.z_score * np.std(self._norms)))

    def rejects(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() bool: what `judge` will say of the next step, decided on the device."""
        return ~(torch.isfinite(loss) & torch.isfinite(grad_norm) & (grad_norm <= self.most_norm))

    def judge(self, loss: float, grad_norm: float, scaler: torch.amp.GradScaler | None = None) -> Outcome:
        """Decide on the next step, and remember it; `scaler` has been updated after it."""
        outcome = Outcome.TAKEN
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            # GradScaler begins at 65,536 and halves until gradients fit float16: up to 16 steps of
            # a healthy run. Below 1 scaling is not to blame, nor where the loss itself overflows.
            if scaler is not None and scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= 1:
                return Outcome.RESCALED
            outcome = Outcome.NOT_FINITE
        elif grad_norm > self.most_norm:
            outcome = Outcome.SPIKE
        elif self.z_score:
            self._norms.append(grad_norm)
        self.bad_steps = 0 if outcome is Outcome.TAKEN else self.bad_steps + 1
        return outcome
