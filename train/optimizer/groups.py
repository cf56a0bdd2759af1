"""Which parameters decay, and which optimizer updates them."""

from torch import nn

from pipeline.config.keys import OptimizerConfig
from train.optimizer.adamw import AdamW


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW. Matrices decay; biases and the gains of norms, which are vectors, do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As in GPT-3 and nanoGPT: decay is a prior on matrices, gains and biases are few.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
