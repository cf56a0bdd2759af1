"""AdamW over two groups of parameters, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from pipeline.config import Config, OptimizerConfig


def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019). Matrices decay; biases and layer norms, which are vectors, do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """The rate of the optimizer step after `step` completed ones: linear warmup, half a cosine down to min_lr, then flat."""
    lr, min_lr, warmup = config.optimizer.lr, config.optimizer.min_lr, config.schedule.warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    if step >= config.decay_steps:
        return min_lr
    progress = (step - warmup) / (config.decay_steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
