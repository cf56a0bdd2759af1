"""Which optimizer updates which parameters, and which of them decay."""

from collections import defaultdict

from torch import Tensor, nn

from pipeline.config.keys import OptimizerConfig
from pipeline.model.language_model import LanguageModel
from train.optimizer.adamw import AdamW
from train.optimizer.muon import Muon

Optimizer = AdamW | Muon


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest. Matrices decay; biases and the
    gains of norms, which are vectors, do not.
    """
    stacks = matrix_stacks(model) if config.name == "muon" and isinstance(model, LanguageModel) else []
    taken = {matrix for stack, _ in stacks for matrix in stack}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in taken]
    # As in GPT-3 and nanoGPT: decay is a prior on matrices, gains and biases are few.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    rest = AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return Muon(stacks, config.weight_decay, rest) if stacks else rest


def matrix_stacks(model: LanguageModel) -> list[tuple[list[Tensor], int]]:
    """The matrices of the blocks, those of one shape together, with the number of matrices that each
    is fused from. Embeddings and the head are tables of rows that tokens update one by one: not among them.
    """
    stacks: dict[tuple[tuple[int, ...], int], list[Tensor]] = defaultdict(list)
    for name, parameter in model.blocks.named_parameters():
        if parameter.ndim == 2:
            count = next((count for ending, count in model.fused.items() if name.endswith(ending)), 1)
            stacks[tuple(parameter.shape), count].append(parameter)
    return [(stack, count) for (_, count), stack in stacks.items()]
