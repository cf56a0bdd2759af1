"""How large gradients and updates are in each kind of layer, every hundred steps or so.

A kind is a parameter's name without the number of its block, so it needs no knowledge of the model. An
update is usually about 1e-3 of its weights; where it is far from that, the learning rate is off.
"""

import math
import re
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeline.model.sharding import whole
from pipeline.runs import Row

EVERY_STEPS = 100  # at least: a copy of the weights and their norms take about a twentieth of a step


class LayerNorms:
    """Measures the steps that have a row, one in EVERY_STEPS. All ranks call it together."""

    def __init__(self, model: torch.nn.Module, log_every_steps: int) -> None:
        self._every_steps = math.ceil(EVERY_STEPS / log_every_steps) * log_every_steps
        self._kinds: dict[str, list[Tensor]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            self._kinds[re.sub(r"^.*\.\d+\.", "", name)].append(parameter)
        self._before: dict[str, list[Tensor]] = {}
        self.columns: Row = {}  # of the last step; empty unless it was measured

    def before_update(self, step: int) -> None:
        """After `step` steps, with the gradients of the next one, not clipped yet."""
        self.columns = {}
        if (step + 1) % self._every_steps == 0:
            # Activations are gone by now: there is room for a copy of the weights.
            self._before = {kind: [p.detach().clone() for p in group] for kind, group in self._kinds.items()}
            for kind, group in self._kinds.items():
                self.columns[f"grad_norm/{kind}"] = _norm([p.grad for p in group if p.grad is not None])

    def after_update(self) -> None:
        for kind, before in self._before.items():
            updates = [p.detach() - old for p, old in zip(self._kinds[kind], before, strict=True)]
            self.columns[f"update_ratio/{kind}"] = _norm(updates) / (_norm(before) or math.nan)
        self._before = {}


def _norm(tensors: list[Tensor]) -> float:
    return float(whole(get_total_norm(tensors)))
