"""AdamW, and what a checkpoint has to know of its state."""

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """Fused AdamW (Loshchilov and Hutter 2019)."""

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state before its first step, as torch creates it: same strides, sharding
        and device.
        """
        return {
            # The fused kernel counts steps on the device, in float32.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
