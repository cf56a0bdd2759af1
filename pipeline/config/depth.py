"""One number for a recipe: `--depth N` sets shape, optimizer, batch and steps of a run. No torch.

docs/recipes.md has the evidence for each rule.
"""

import math
from collections.abc import Sequence

from pipeline.config.keys import Config
from pipeline.config.load import config_from_arguments, override

HEAD_WIDTH = 64  # so 12 layers are 768 wide, the shape of GPT-2 124M
TOKENS_PER_PARAMETER = 20  # lowest loss for the FLOPs (Hoffmann et al. 2022, table 3)
# Published runs of 12 layers: 2**19 tokens a step; nanochat's and modded-nanogpt's rates of Muon are
# 3.6e-3 and 4.5e-3 as its updates are scaled here.
REFERENCE_DEPTH, REFERENCE_LOG2_TOKENS, REFERENCE_LR = 12, 19, 4e-3
BATCH_EXPONENT = 0.383  # tokens a step by tokens of the run (Bergsma et al. 2025)
COOLDOWN = 0.6  # of the steps
FORGETTING = 1.3  # lr x weight_decay x steps: constant over sizes (Wang and Aitchison 2024)
LEAST_STEPS = 400  # small runs take smaller steps rather than fewer
MOST_SEQUENCES, MOST_RANKS = 16, 8  # of a micro-batch; ranks over which a step divides
MOST_LAYERS = 96  # GPT-3 175B's


def with_depth(arguments: Sequence[str], depth: int) -> list[str]:
    """`[CONFIG] [section.key=value]...` with the keys that `depth` sets, before the given ones, which
    win.
    """
    named = bool(arguments) and "=" not in arguments[0]
    # The other changes may fit the depth alone, such as model.n_kv_head=4 to its heads.
    contexts = [change for change in arguments[named:] if change.partition("=")[0].strip() == "model.block_size"]
    config = config_from_arguments([*arguments[:named], *contexts])
    name = f"{config.run.name}-depth-{depth}" if named else f"depth-{depth}"
    return [*arguments[:named], override("run.name", name), *settings(depth, config), *arguments[named:]]


def settings(depth: int, config: Config) -> list[str]:
    """What a depth sets, as `section.key=value`; context, data, evaluations and checkpoints remain."""
    width, block_size = HEAD_WIDTH * depth, config.model.block_size
    parameters = 12 * depth * width**2  # of the blocks: 4 width**2 of attention, 8 of the MLP
    tokens = TOKENS_PER_PARAMETER * parameters
    log2_tokens_per_step = min(
        REFERENCE_LOG2_TOKENS + BATCH_EXPONENT * math.log2((depth / REFERENCE_DEPTH) ** 3),
        math.log2(tokens / LEAST_STEPS),
    )
    sequences = max(1, 2 ** round(log2_tokens_per_step - math.log2(block_size)))
    tokens_per_step = sequences * block_size
    steps = max(1, round(tokens / tokens_per_step))
    lr = REFERENCE_LR * math.sqrt(REFERENCE_DEPTH / depth)
    keys = {
        "model.arch": "qwen3", "model.n_layer": depth, "model.n_head": depth, "model.n_kv_head": 0, "model.head_dim": 0,
        "model.n_inner": 0, "model.n_embd": width, "model.bias": False, "model.tie_weights": False,
        "optimizer.name": "muon", "optimizer.lr": float(f"{lr:.2g}"), "optimizer.min_lr": 0.0,
        "optimizer.weight_decay": float(f"{FORGETTING / (lr * steps):.2g}"),
        "schedule.kind": "wsd", "schedule.warmup_steps": 0, "schedule.decay_steps": 0,
        "schedule.cooldown_steps": max(1, round(COOLDOWN * steps)),
        "train.max_steps": steps, "train.tokens_per_step": tokens_per_step,
        "train.micro_batch_size": max(1, min(MOST_SEQUENCES, sequences // MOST_RANKS)),
    }  # fmt: skip
    return [override(name, value) for name, value in keys.items()]
