"""AdamW as the trainer and its checkpoints use it."""

import torch
from torch import Tensor


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
