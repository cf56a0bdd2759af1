"""The arithmetic of a run: tokens and accumulation. No torch."""

from pipeline.config.keys import Config
from pipeline.errors import UserError


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches each rank accumulates for one optimizer step. Raises UserError with the nearest values that divide."""
    train, block_size = config.train, config.model.block_size
    wanted = train.tokens_per_step
    at_once = train.micro_batch_size * block_size * world_size
    if wanted % at_once == 0:
        return wanted // at_once
    below = wanted // at_once * at_once
    nearest = [str(value) for value in (below, below + at_once) if value]
    per_rank, remainder = divmod(wanted, block_size * world_size)
    micro = [size for size in range(1, per_rank + 1) if per_rank % size == 0] if remainder == 0 else []
    fitting = sorted(micro, key=lambda size: abs(size - train.micro_batch_size))[:2]
    hint = f", or train.micro_batch_size={' or '.join(map(str, sorted(fitting)))}" if fitting else ""
    raise UserError(
        f"train.tokens_per_step={wanted} does not divide: one micro-batch of every rank is micro_batch_size "
        f"{train.micro_batch_size} x block_size {block_size} x {world_size} rank(s) = {at_once} tokens; "
        f"set train.tokens_per_step={' or '.join(nearest)}{hint}"
    )
