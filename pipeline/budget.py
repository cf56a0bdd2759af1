"""The arithmetic of a run before it starts: tokens, accumulation, epochs, parameters, FLOPs, bytes.
No torch.
"""

import math
from pathlib import Path

from pipeline.checkpoint.layouts import layout_of
from pipeline.config.keys import Config, ModelConfig
from pipeline.dataset.shards import Manifest
from pipeline.dataset.windows import window_count
from pipeline.errors import UserError

# Float32 weights, and AdamW's two moments of each.
CHECKPOINT_BYTES_PER_PARAMETER = 12


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches each rank accumulates for one optimizer step. Raises UserError with the nearest
    values that divide.
    """
    train, block_size = config.train, config.model.block_size
    wanted = train.tokens_per_step
    tokens_at_a_time = train.micro_batch_size * block_size * world_size
    if wanted % tokens_at_a_time == 0:
        return wanted // tokens_at_a_time
    # 0 tokens would divide too.
    below = wanted // tokens_at_a_time * tokens_at_a_time
    nearest = [str(value) for value in (below, below + tokens_at_a_time) if value]
    # A smaller or larger micro-batch may divide where the ranks do.
    per_rank, remainder = divmod(wanted, block_size * world_size)
    micro = [size for size in range(1, per_rank + 1) if per_rank % size == 0] if remainder == 0 else []
    fitting = sorted(micro, key=lambda size: abs(size - train.micro_batch_size))[:2]
    hint = f", or train.micro_batch_size={' or '.join(map(str, sorted(fitting)))}" if fitting else ""
    raise UserError(
        f"train.tokens_per_step={wanted} does not divide: one micro-batch of every rank is micro_batch_size "
        f"{train.micro_batch_size} x block_size {block_size} x {world_size} rank(s) = {tokens_at_a_time} tokens; "
        f"set train.tokens_per_step={' or '.join(nearest)}{hint}"
    )


def step_arithmetic(config: Config, world_size: int) -> str:
    """How a step adds up, with every factor, so that a wrong one is noticed before it costs
    anything.
    """
    train = config.train
    return (
        f"tokens_per_step {train.tokens_per_step:,} = micro_batch_size {train.micro_batch_size} x block_size "
        f"{config.model.block_size} x accumulation {accumulation_steps(config, world_size)} x {world_size} rank(s)"
    )


def data_arithmetic(config: Config, folder: Path, manifest: Manifest, share: float) -> str:
    """What a run takes of one dataset, whose part of the samples is `share` (1 unless in a
    mixture).
    """
    train, block_size = config.train, config.model.block_size
    windows = round(share * (train.max_steps * train.tokens_per_step // block_size))
    tokens = manifest.count("train", "tokens")
    epochs = windows / window_count(tokens, block_size)
    part = f" ({share:.2%} of the samples)" if share < 1 else ""
    return (
        f"data {folder}{part}: {tokens:,} train tokens; {train.max_steps:,} steps take {windows * block_size:,} tokens, "
        f"{epochs:.2f} epoch(s)"
    )


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, tied ones once, without padding: what the literature calls a model's
    size.
    """
    layout = layout_of(model)
    shapes = layout.shapes(model, vocab_size).items()
    return sum(math.prod(shape) for name, shape in shapes if layout.is_trained(model, name))


def flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Forward and backward: 6 for each weight that is multiplied, 12 L C T for attention (Chowdhery
    et al. 2022).
    """
    # Rows of a table are looked up; a tied token embedding is multiplied too, as the head.
    rows = len(layout_of(model).position_rows) * model.block_size + (0 if model.tie_weights else vocab_size)
    multiplied = parameters(model, vocab_size) - rows * model.n_embd
    return 6 * multiplied + 12 * model.n_layer * model.n_embd * model.block_size


def most_checkpoints(config: Config) -> int:
    """How many a run's folder may hold: the newest, the permanent, the best and the one being
    written.
    """
    every = config.checkpoint.keep_every_steps
    return config.checkpoint.keep + (config.train.max_steps // every if every else 0) + 2


def checkpoint_bytes(model: ModelConfig, vocab_size: int) -> int:
    """Size of one checkpoint on disk, but for tokenizer and descriptions."""
    return CHECKPOINT_BYTES_PER_PARAMETER * parameters(model, vocab_size)
