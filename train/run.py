"""A config -> a trained run: the parts put together in reading order."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint, distributed
from pipeline.config import Config, to_dict, to_toml
from pipeline.device import pick_dtype, share_threads, should_compile
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.files import one_writer, write_atomic
from pipeline.log import also_to_file, logger
from pipeline.model import GPT
from pipeline.shards import Manifest, load_manifest
from train.metrics import Metrics
from train.trainer import Trainer

# What the position in the data and the shape of the weights follow from: it cannot change between two starts of a run.
FIXED_KEYS = (
    "run.seed", "train.tokens_per_step", "model.arch", "model.n_layer", "model.n_head", "model.n_embd",
    "model.block_size", "model.bias", "model.tie_weights",
)  # fmt: skip


def run(config: Config, dry_run: bool = False) -> None:
    """Train, or with `dry_run` say what would be trained and write nothing. Raises UserError, Diverged."""
    world = distributed.start(config.run.device)
    try:
        run_on(world, config, dry_run)
    finally:
        distributed.stop()


def run_on(world: World, config: Config, dry_run: bool) -> None:
    """`run`, on ranks that have found each other."""
    with world.fail_together():
        trainer, introduction = assemble(config, world)
        start = start_point(config)
    world.check_agreement("the dataset", trainer.manifest.fingerprint)
    world.check_agreement("the config", to_dict(config))
    with ExitStack() as stack:
        with world.fail_together():
            if world.is_first and not dry_run:
                stack.enter_context(one_writer(config.run_dir))
                stack.enter_context(also_to_file(config.run_dir / "log.txt"))
        logger.info("%s", introduction)
        if dry_run:
            logger.info("dry run: would %s; nothing was written", f"resume {start}" if start else "start at step 0")
        else:
            train(trainer, start)


def assemble(config: Config, world: World) -> tuple[Trainer, str]:
    """The trainer of a run, and the first lines of its log: what it is and what it will do."""
    threads = share_threads(world.local_size)
    manifest = load_manifest(config.dataset_dir)
    dtype, why_dtype = pick_dtype(config.run.dtype, world.device, config.model.n_embd)
    compiled, why_compiled = should_compile(config.run.compile, world.device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on a GPU; no effect on a CPU
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, manifest.tokenizer["vocab_size"]).to(world.device)
    if compiled:
        model.compile()
    trainer = Trainer(config, world, model, manifest, dtype)
    introduction = [
        f"run {config.run_dir}: {world.size} rank(s) on {world.device.type}, {threads} thread(s) each",
        f"dtype {str(dtype).removeprefix('torch.')}: {why_dtype}; compile {'on' if compiled else 'off'}: {why_compiled}",
        f"model: {model.parameter_count():,} parameters, vocabulary {model.vocab_size:,} ({manifest.tokenizer['name']})",
        *arithmetic(trainer),
    ]
    return trainer, "\n".join(introduction)


def arithmetic(trainer: Trainer) -> list[str]:
    """How a step and the run add up, with every factor, so that a wrong one is seen before it costs anything."""
    config, train = trainer.config, trainer.config.train
    tokens = config.train.max_steps * train.tokens_per_step
    there = trainer.manifest.count("train", "tokens")
    return [
        f"tokens_per_step {train.tokens_per_step:,} = micro_batch_size {train.micro_batch_size} x block_size "
        f"{config.model.block_size} x accumulation {trainer.accumulation} x {trainer.world.size} rank(s)",
        f"data {config.dataset_dir}: {there:,} train tokens; {train.max_steps:,} steps take {tokens:,} tokens, "
        f"{tokens / there:.2f} epoch(s)",
    ]


def start_point(config: Config) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. Raises UserError where checkpoint.resume forbids it."""
    checkpoints = config.run_dir / "checkpoints"
    found = checkpoint.named(checkpoints, "latest")
    if found is None and config.checkpoint.resume == "must":
        raise UserError(
            f"nothing to resume: {checkpoints} has no checkpoint, and checkpoint.resume=must forbids a fresh start"
        )
    if found is not None and config.checkpoint.resume == "never":
        raise UserError(
            f"{config.run_dir} has checkpoints up to {found.name}, and checkpoint.resume=never forbids going on: "
            "choose another run.name, or move the folder away"
        )
    return found


def train(trainer: Trainer, start: Path | None) -> None:
    """From a checkpoint or from step 0 to the last step, and status.json tells how it ended."""
    config, world = trainer.config, trainer.world
    with world.fail_together():
        begin(trainer, start)
    world.check_agreement("the step", trainer.step)
    metrics = Metrics(config.run_dir, trainer.step, config.log.tensorboard) if world.is_first else None
    if metrics:
        write_atomic(config.run_dir / "config.toml", to_toml(config).encode())
        metrics.status("running", trainer.step)
    state, reason = "failed", ""
    try:
        reason = trainer.fit(metrics)
        state = "stopped" if reason else "done"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if metrics:
            metrics.status(state, trainer.step, reason)
            metrics.close()
    world.barrier()
    logger.info("%s at step %d%s", state, trainer.step, f": {reason}" if reason else "")


def begin(trainer: Trainer, start: Path | None) -> None:
    """Put the weights in: those of a checkpoint, those the config names, or the random ones that are there."""
    config = trainer.config
    if start is not None:
        check_resumable(checkpoint.describe(start), config, trainer.manifest)
        trainer.restore(start)
        logger.info("resumed %s: step %d of %d", start, trainer.step, config.train.max_steps)
    elif config.model.init_from:
        checkpoint.load_weights(trainer.model, Path(config.model.init_from))
        logger.info("initial weights: %s", config.model.init_from)


def check_resumable(saved: checkpoint.Description, config: Config, manifest: Manifest) -> None:
    """Raises UserError where going on would not be the same run; says which other keys changed."""
    if saved.dataset != manifest.fingerprint:
        raise UserError(
            f"{config.run_dir} was trained on another dataset (fingerprint {saved.dataset[:12]}) than {config.dataset_dir} "
            f"({manifest.fingerprint[:12]}): restore that one, or choose another run.name"
        )
    before, now = _flat(saved.config), _flat(to_dict(config))
    changed = [f"{key} {before.get(key)!r} -> {value!r}" for key, value in now.items() if before.get(key) != value]
    fixed = [change for change in changed if change.split()[0] in FIXED_KEYS]
    if fixed:
        raise UserError(
            f"{config.run_dir} cannot go on with {', '.join(fixed)}: set them back, or choose another run.name"
        )
    if changed:
        logger.info("changed since the checkpoint: %s", ", ".join(changed))


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
