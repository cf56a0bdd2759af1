"""Which parameters decay, and which optimizer updates them."""

import torch
from torch import Tensor, nn

from pipeline.config.keys import OptimizerConfig


class AdamW(torch.optim.AdamW):
    """Fused AdamW (Loshchilov and Hutter 2019), and what a checkpoint has to know of its state."""

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state before its first step, as torch creates it: same strides, sharding
        and device.
        """
        # The fused kernel counts steps on the device, in float32.
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **moments}

    def step_unless(self, rejected: Tensor) -> None:
        """Update the parameters unless `rejected`, () on their device, is true: the kernel looks at it,
        and the host does not wait.
        """
        if rejected.device.type not in ("cpu", "cuda"):  # Metal's kernel cannot read the flag
            if not rejected:
                self.step()
            return
        # Where gradient scaling reports an overflow to a fused kernel, which then leaves all as it is.
        self.found_inf = rejected.float()
        self.step()
        del self.found_inf


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW. Matrices decay; biases and the gains of norms, which are vectors, do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As in GPT-3 and nanoGPT: decay is a prior on matrices, gains and biases are few.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
