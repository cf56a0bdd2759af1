"""The learning rate as a function of the step."""

import math

from pipeline.config.keys import Config


def learning_rate(step: int, config: Config) -> float:
    """The rate of the optimizer step after `step` completed ones: linear warmup; half a cosine down
    to min_lr or, in wsd, constant and then linear down to it; then flat.
    """
    lr, min_lr, warmup = config.optimizer.lr, config.optimizer.min_lr, config.schedule.warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup  # never 0: the first step is not wasted
    # After the warmup check: a run shorter than its warmup keeps rising, and a note at its start
    # says so.
    left = config.decay_steps - step
    if left <= 0:
        return min_lr
    if config.schedule.kind == "wsd":  # Hu et al. 2024
        cooldown = config.cooldown_steps
        return lr if left >= cooldown else min_lr + (lr - min_lr) * left / cooldown
    progress = (step - warmup) / (config.decay_steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
