"""A config -> a trained run: the parts put together in reading order."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from pipeline import launch
from pipeline.checkpoint.find import find_model_folder
from pipeline.checkpoint.folder import Description
from pipeline.checkpoint.load import load_initial_weights
from pipeline.checkpoint.pointers import set_aside_after
from pipeline.config.keys import Config
from pipeline.config.load import from_dict, to_dict, to_toml
from pipeline.dataset.mixture import Mixture
from pipeline.errors import EXIT_INTERRUPTED, Diverged, UserError
from pipeline.files import one_writer, write_atomic
from pipeline.log import also_to_file, logger
from pipeline.machine import ranks as distributed
from pipeline.machine.device import pick_dtype, share_threads, should_compile
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from train import parallel, resume
from train.data import staging
from train.metrics import Metrics
from train.replicas import check_replicas
from train.stop import StopRequest
from train.trainer import Preview, Trainer

# What the position in the data and the shape of the weights follow from: it cannot change between two starts of a run.
FIXED_KEYS = (
    "run.seed", "train.tokens_per_step", "model.arch", "model.n_layer", "model.n_head", "model.n_embd",
    "model.block_size", "model.bias", "model.tie_weights", "data.document_mask",
)  # fmt: skip
# Of a job that SLURM started again because a node was lost, a rank may still write there, and a file server holds the lock of
# a dead one until its lease is over (NFS: 90 s).
LAST_START_S = 300.0


def run(config: Config, dry_run: bool = False, stage_to: Path | None = None, preview: Preview | None = None) -> str:
    """Train, or with `dry_run` check everything and write nothing. `stage_to` is the folder on each node's own disk for
    copies of the datasets, `preview` goes on from eval.sample_prompt. Returns why the run stopped before its last step,
    empty where it is done. Raises UserError, Diverged.
    """
    world = distributed.start(config.run.device)
    try:
        return run_on(world, config, dry_run, stage_to, preview)
    finally:
        distributed.stop()


def run_on(
    world: World, config: Config, dry_run: bool, stage_to: Path | None = None, preview: Preview | None = None
) -> str:
    """`run`, on ranks that have found each other."""
    with world.fail_together():
        mixture = Mixture(config)
        if world.is_first:  # for its complaints, which should come before a folder is made
            resume.candidates(config.run_dir / "checkpoints", config.checkpoint.resume)
    world.check_agreement("the dataset", mixture.fingerprint)
    world.check_agreement("the config", to_dict(config))
    if stage_to is not None:
        mixture = staging.stage(mixture, config, world, stage_to, dry_run)
    mesh = parallel.mesh_of(config.parallel.strategy, world)
    with ExitStack() as stack:
        with world.fail_together():
            trainer, introduction = assemble(config, world, mixture, mesh, preview)
            if world.is_first and not dry_run:
                patience_s = LAST_START_S if launch.was_requeued() else 0.0
                stack.enter_context(one_writer(config.run_dir, patience_s=patience_s))
                stack.enter_context(also_to_file(config.run_dir / "log.txt"))
            logger.info("%s", introduction)
            start = start_point(config, mixture, dry_run) if world.is_first else None
        start = world.gather(start)[0]
        with world.fail_together():
            put_weights_in(trainer, start)
        world.check_agreement("the step", trainer.step)
        world.check_agreement("the skipped samples", trainer.skipped.rows)
        check_replicas(trainer.model, world, trainer.step)
        if dry_run:
            logger.info("dry run: everything fits, nothing was written")
            return ""
        trainer.replicate()
        return train(trainer)


def assemble(
    config: Config, world: World, mixture: Mixture, mesh: DeviceMesh | None = None, preview: Preview | None = None
) -> tuple[Trainer, str]:
    """The trainer of a run, and the first lines of its log: what it is and what it will do."""
    threads = share_threads(world.local_size)
    dtype, why_dtype = pick_dtype(config.run.dtype, world.device, config.model.n_embd)
    compiled, why_compiled = should_compile(config.run.compile, world.device)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    torch.manual_seed(config.run.seed)
    model = LanguageModel(config.model, mixture.tokenizer["vocab_size"])
    parallel.place(model, world, mesh, dtype, compiled)
    trainer = Trainer(config, world, model, mixture, dtype, preview)
    introduction = [
        f"run {config.run_dir}: {world.size} rank(s) on {world.device.type}, {threads} thread(s) each",
        f"parallel {parallel.in_words(config.parallel.strategy, mesh, world)}",
        f"dtype {str(dtype).removeprefix('torch.')}: {why_dtype}; compile {'on' if compiled else 'off'}: {why_compiled}",
        f"model: {model.parameter_count():,} parameters, vocabulary {model.vocab_size:,} ({mixture.tokenizer['name']})",
        *arithmetic(trainer),
    ]
    return trainer, "\n".join(introduction)


def arithmetic(trainer: Trainer) -> list[str]:
    """How a step and the run add up, with every factor, so that a wrong one is seen before it costs anything."""
    config, train = trainer.config, trainer.config.train
    lines = [
        f"tokens_per_step {train.tokens_per_step:,} = micro_batch_size {train.micro_batch_size} x block_size "
        f"{config.model.block_size} x accumulation {trainer.accumulation} x {trainer.world.size} rank(s)",
    ]
    progress = trainer.mixture.progress(train.max_steps * train.tokens_per_step // config.model.block_size)
    for source, (tokens, epochs) in zip(trainer.mixture.sources, progress.values(), strict=True):
        share = f" ({source.share:.2%} of the samples)" if source.share < 1 else ""
        lines.append(
            f"data {source.folder}{share}: {source.manifest.count('train', 'tokens'):,} train tokens; "
            f"{train.max_steps:,} steps take {tokens:,} tokens, {epochs:.2f} epoch(s)"
        )
        if source.manifest.is_foreign:
            lines.append(
                f"note: {source.folder} has no manifest: taken for {source.manifest.program}'s shards of GPT-2's vocabulary"
            )
    if config.schedule.warmup_steps >= config.decay_steps:
        lines.append(
            f"note: schedule.warmup_steps={config.schedule.warmup_steps:,} leaves no room before step {config.decay_steps:,}, "
            "where the learning rate should have come down: the run ends while it still rises"
        )
    return lines


def start_point(config: Config, mixture: Mixture, dry_run: bool) -> Path | None:
    """The checkpoint to go on from, verified; None for a fresh start. Raises UserError where none there can be used."""

    def check(saved: Description) -> None:
        check_resumable(saved, config, mixture)

    return resume.start_point(config.run_dir / "checkpoints", config.checkpoint.resume, check, dry_run)


def put_weights_in(trainer: Trainer, start: Path | None) -> None:
    """Those of a checkpoint, those the config names, or the random ones that are there."""
    config = trainer.config
    if start is not None:
        trainer.restore(start)
        logger.info("from %s: step %d of %d", start, trainer.step, config.train.max_steps)
    elif config.model.init_from:
        load_initial_weights(trainer.model, trainer.mixture.tokenizer, find_model_folder(config.model.init_from))
        logger.info("initial weights: %s", config.model.init_from)


def train(trainer: Trainer) -> str:
    """To the last step, or to a reason to stop, which is returned; status.json tells how it ended."""
    config, world = trainer.config, trainer.world
    metrics = None
    if world.is_first:
        set_aside_after(trainer.checkpoints, trainer.step)
        metrics = Metrics(config.run_dir, trainer.step, config.log.tensorboard)
        write_atomic(config.run_dir / "config.toml", to_toml(config).encode())
        metrics.status("running", trainer.step)
    state, reason = "failed", ""
    try:
        with StopRequest() as stop:
            reason = trainer.fit(metrics, stop)
        state = "stopped" if reason else "done"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Diverged):  # every rank leaves, and the first has yet to say why
            launch.outlive_others()
        raise
    finally:
        trainer.batches.close()
        if metrics:
            metrics.status(state, trainer.step, reason)
            metrics.close()
        if reason.startswith("KeyboardInterrupt") and trainer.saver.busy:
            logger.warning("interrupted twice: the checkpoint that was being written is dropped")
            os._exit(EXIT_INTERRUPTED)  # "now" is not after the disk has taken gigabytes
        trainer.saver.close()
    world.barrier()
    for name, (tokens, epochs) in trainer.mixture.progress(trainer.first_sample).items():
        logger.info("data %s: %s tokens seen, %.2f epoch(s)", name, f"{tokens:,}", epochs)
    logger.info("%s at step %d%s", state, trainer.step, f": {reason}" if reason else "")
    return reason


def check_resumable(saved: Description, config: Config, mixture: Mixture) -> None:
    """Raises UserError where going on would not be the same run; says which other keys changed."""
    if saved.dataset != mixture.fingerprint:
        raise UserError(
            f"{config.run_dir} was trained on another dataset (fingerprint {saved.dataset[:12]}) than {mixture} "
            f"({mixture.fingerprint[:12]}): restore that one, or choose another run.name"
        )
    before, now = _flat(to_dict(from_dict(saved.config))), _flat(to_dict(config))
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
