"""A config -> a trained run: the parts put together in reading order."""

import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh

from pipeline import launch
from pipeline.budget import data_arithmetic, outlook, parameters, step_arithmetic
from pipeline.checkpoint.find import find_model_folder
from pipeline.checkpoint.load import load_initial_weights, load_weights
from pipeline.checkpoint.prune import in_use
from pipeline.config.keys import Config
from pipeline.config.load import to_dict, to_toml
from pipeline.dataset.mixture import Mixture
from pipeline.errors import EXIT_INTERRUPTED
from pipeline.files import one_writer, write_atomic
from pipeline.log import also_to_file, logger
from pipeline.machine import ranks
from pipeline.machine.device import DTYPES, device_name, pick_dtype, share_threads
from pipeline.machine.gpus import format_peak
from pipeline.machine.ranks import World
from pipeline.machine.watch import Fault
from pipeline.model.language_model import LanguageModel
from pipeline.runs import RunFolder, State
from train import parallel, resume
from train.checks.nodes import check_nodes, code_version
from train.checks.replicas import check_replicas
from train.data.staging import stage
from train.memory import explained
from train.metrics.record import FileMetrics, Metrics, reference_losses
from train.metrics.tensorboard import TensorBoard
from train.metrics.trackers import Tracker, is_installed
from train.preview import Preview
from train.saving import choose_best
from train.stop import MAX_MINUTES, StopRequest
from train.trainer import Trainer

# When SLURM restarts a job because a node was lost, a rank of the last start may still be writing,
# and a file server holds the lock of a dead one until its lease is over (NFS: 90 s).
LAST_START_S = 300.0
DRY_RUN = (
    "dry run: config, datasets, batch, ranks, weights and checkpoints were checked, nothing was written. Not checked: "
    "whether a step fits the memory and how long it takes, disk space, compiling; `pipeline plan` says what is known"
)


def run(config: Config, *, dry_run: bool = False, stage_to: Path | None = None, preview: Preview | None = None) -> str:
    """Train, or with `dry_run` check everything and write nothing. Returns why the run stopped
    before its last step, empty when it is done. Raises UserError, Diverged.

    `stage_to`: the folder on each node's local disk for copies of the datasets; `preview`:
    continues eval.sample_prompt.
    """
    world = ranks.start(config.run.device, config.parallel.timeout_s)
    try:
        reason = run_on(world, config, dry_run=dry_run, stage_to=stage_to, preview=preview)
    except Exception as error:
        raise world.watch.settle(error) from None
    # After an error the ranks do not part in order: what it refers to, or a rank that is gone, would
    # keep this one waiting.
    world.watch.close()
    ranks.stop()
    return reason


def run_on(world: World, config: Config, *, dry_run: bool, stage_to: Path | None, preview: Preview | None) -> str:
    """`run`, on ranks that have found each other. A function, so that nothing refers to the trainer
    and its process group when the ranks part: with a reference, a rank may hang at its end.
    """
    world.start_watch(config.parallel.timeout_s)
    folder = RunFolder(config.run_dir)
    with world.fail_together():
        mixture = Mixture(config)
        if world.is_first:  # for its errors, which should come before a folder is created
            resume.candidates(folder.checkpoints, config.checkpoint.resume)
    # A node may mount another disk, or an older copy of a config: better a line now than a curve
    # that means nothing.
    world.check_agreement("the dataset", mixture.fingerprint)
    world.check_agreement("the config", to_dict(config))
    check_nodes(world)
    if stage_to is not None:
        mixture = stage(mixture, config, world, into=stage_to, dry_run=dry_run)
    mesh = parallel.mesh_of(config.parallel.strategy, world)
    kind = autocast_type(config, world)
    with ExitStack() as stack:
        with world.fail_together():
            trainer, introduction = assemble(config, world, mixture, kind, mesh=mesh, preview=preview)
            if world.is_first and not dry_run:
                patience_s = LAST_START_S if launch.was_requeued() else 0.0
                stack.enter_context(one_writer(folder.path, patience_s=patience_s))
                stack.enter_context(trainer.status)
                stack.enter_context(also_to_file(folder.log))
            logger.info("%s", introduction)
            start = resume.start_point(config, mixture, dry_run) if world.is_first else None
        # Only rank 0 looks at the checkpoints: another one might see an older state of a network
        # disk.
        start = world.gather(start)[0]
        with in_use(start.folder if start is not None and world.is_first else None):
            initialise(trainer, start)
        world.check_agreement("the step", trainer.step)
        check_replicas(trainer.model, world, trainer.step)
        if dry_run:
            name = device_name(world.device)
            logger.info("%s", "\n".join(outlook(config, trainer.model.vocab_size, name, world.size)))
            logger.info("%s", DRY_RUN)
            return ""
        trainer.replicate()
        return train(trainer, folder)


def autocast_type(config: Config, world: World) -> tuple[torch.dtype, str]:
    """The type of the run, and why: on a CPU `auto` is what the run began with, on whichever machine.
    All ranks call it together, as a trial may end otherwise on another one.
    """
    kind = None
    with world.fail_together():
        if world.is_first:
            status = RunFolder(config.run_dir).read_status()
            asks = config.run.dtype == "auto" and world.device.type == "cpu"
            kind = pick_dtype(config.run.dtype, world.device, config.model.n_embd)
            if asks and status is not None and status.dtype in ("float32", "bfloat16"):
                kind = DTYPES[status.dtype], "as the run began"
    return cast(tuple[torch.dtype, str], world.gather(kind)[0])


def assemble(
    config: Config, world: World, mixture: Mixture, kind: tuple[torch.dtype, str], *,
    mesh: DeviceMesh | None = None, preview: Preview | None = None,
) -> tuple[Trainer, str]:  # fmt: skip
    """The trainer of a run, and the first lines of its log: what it is and what it will do. `kind`: as
    of `autocast_type`.
    """
    threads, (dtype, why_dtype) = share_threads(world.local_size), kind
    compiled, why_compiled = parallel.should_compile(config.run.compile, world.device)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        # With a mask cuDNN's gradients are NaN at some lengths (https://github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(not config.data.document_mask)
    model = LanguageModel.without_memory(config.model, mixture.tokenizer["vocab_size"])
    parallel.allocate(model, world, mesh, dtype=dtype, compiled=compiled)
    trainer = Trainer(config, world, mixture, model=model, dtype=dtype, preview=preview)
    named = str(dtype).removeprefix("torch.")
    trainer.status.update(parameters=parameters(config.model, model.vocab_size), dtype=named)
    introduction = [
        f"run {config.run_dir}: {world.size} rank(s) on {world.device.type}, {threads} thread(s) each",
        f"parallel {parallel.format_strategy(config.parallel.strategy, mesh, world)}",
        f"dtype {named}: {why_dtype}; compile {'on' if compiled else 'off'}: {why_compiled}",
        format_peak(device_name(world.device)),
        f"model: {trainer.status.now.parameters:,} parameters, "
        f"vocabulary {model.vocab_size:,} ({mixture.tokenizer['name']})",
        step_arithmetic(config, world.size),
        *(data_arithmetic(config, source.folder, source.manifest, source.share) for source in mixture.sources),
        *notes(config, mixture),
    ]
    return trainer, "\n".join(introduction)


def notes(config: Config, mixture: Mixture) -> list[str]:
    """What is probably not meant, but no error."""
    lines = [
        f"note: {source.folder} has no manifest: assumed to be {source.manifest.program}'s shards of GPT-2's vocabulary"
        for source in mixture.sources
        if source.manifest.is_foreign
    ]
    if config.schedule.kind != "wsd" and config.schedule.cooldown_steps:
        lines.append(f"note: schedule.cooldown_steps is ignored: schedule.kind={config.schedule.kind} has no cooldown")
    elif config.schedule.cooldown_steps > config.cooldown_steps:
        lines.append(
            f"note: schedule.cooldown_steps={config.schedule.cooldown_steps:,} are more than the {config.cooldown_steps:,} "
            f"steps before step {config.decay_steps:,} that the warmup leaves: the learning rate falls over all of these"
        )
    if config.schedule.warmup_steps >= config.decay_steps:
        lines.append(
            f"note: schedule.warmup_steps={config.schedule.warmup_steps:,} leaves no room before step {config.decay_steps:,}, "
            "where the learning rate should reach its minimum: the run ends while it still rises"
        )
    if config.model.arch == "qwen3" and config.model.bias:
        lines.append("note: model.bias=true is ignored: qwen3 has no biases")
    return lines


def initialise(trainer: Trainer, start: resume.Start | None = None) -> None:
    """Give all ranks the weights of a checkpoint with its state, those the config names, or random
    ones. All ranks call it together.
    """
    config, world, complete = trainer.config, trainer.world, None
    with world.fail_together():
        if world.is_first:
            complete = initial_model(config, trainer.mixture, start)
    parallel.distribute(complete, trainer.model)
    if start is not None:
        trainer.step = trainer.checkpoints.restore(start.folder, start.began_at)
        done = {"tokens": trainer.position.tokens, "trained_s": trainer.checkpoints.trained_s}
        trainer.status.update(
            step=trainer.step, **done
        )  # the last start may have been killed past it, or before it said so
        logger.info("from %s: step %d of %d", start.folder, trainer.step, config.train.max_steps)
    elif config.model.init_from:
        logger.info("initial weights: %s", config.model.init_from)


def initial_model(config: Config, mixture: Mixture, start: resume.Start | None) -> LanguageModel:
    """On the CPU, the model of a checkpoint, or of the folder that the config names, or a random
    one.
    """
    vocab_size = mixture.tokenizer["vocab_size"]
    if start is None and not config.model.init_from:
        torch.manual_seed(config.run.seed)
        return LanguageModel(config.model, vocab_size)
    model = LanguageModel.uninitialised(config.model, vocab_size)
    if start is not None:
        load_weights(model, start.folder)
    else:
        load_initial_weights(model, mixture.tokenizer, find_model_folder(config.model.init_from))
    return model


def train(trainer: Trainer, folder: RunFolder) -> str:
    """To the last step, or to a reason to stop, which is returned; status.json tells how it ended."""
    world, saver, metrics = trainer.world, trainer.checkpoints.saver, Metrics()
    world.watch.before_exit = lambda fault: record_fault(trainer, fault)
    try:
        with world.fail_together():
            metrics = open_metrics(trainer, folder)
        with StopRequest(looks=world.local_rank == 0) as stop:
            try:
                reason = trainer.fit(metrics, stop)
                world.barrier()
            except Exception as error:
                raise world.watch.settle(explained(error, trainer)) from None
    except KeyboardInterrupt:
        if saver.busy:
            logger.warning("interrupted twice: the checkpoint being written is dropped")
            trainer.status.end(State.FAILED, "KeyboardInterrupt", EXIT_INTERRUPTED)
            os._exit(EXIT_INTERRUPTED)  # "now" does not wait for a disk to take gigabytes
        raise
    finally:
        trainer.batches.close()
        metrics.close()
        saver.close()
    state = State.STOPPED if reason else State.DONE
    used_up = not reason and trainer.step < trainer.config.train.max_steps
    for name, (tokens, epochs) in trainer.mixture.progress(trainer.first_sample).items():
        logger.info("data %s: %s tokens seen, %.2f epoch(s)", name, f"{tokens:,}", epochs)
    minutes = f"train.max_minutes={trainer.config.train.max_minutes:g} are used up" if used_up else ""
    logger.info("%s at step %d%s", state, trainer.step, f": {reason or minutes}" if reason or minutes else "")
    if world.is_first:
        trainer.status.end(state, MAX_MINUTES if used_up else reason, 0)
    if reason:
        logger.info("to resume: %s", resume_command(trainer.config, world, folder))
    return reason


def resume_command(config: Config, world: World, folder: RunFolder) -> str:
    """What continues a run that was stopped, from the same working folder."""
    program = "pipeline" if world.size == 1 else f"torchrun --nproc_per_node {world.local_size} -m pipeline"
    # Not to start from scratch again, nor to go back to the same checkpoint.
    again = "" if config.checkpoint.resume in ("auto", "must") else " --resume auto"
    nodes = "" if world.local_size == world.size else " (on the same number of nodes)"
    return f"{program} train {shlex.quote(str(folder.config))}{again}{nodes}"


def record_fault(trainer: Trainer, fault: Fault) -> None:
    """What rank 0 does before all ranks exit or, where that one is gone, the rank that found out."""
    found = trainer.status.folder.read_status()
    if not trainer.world.is_first and found is not None and found.state is not State.RUNNING:
        return  # rank 0 is gone because it has recorded what ended the run
    try:
        if trainer.world.is_first:
            trainer.status.update(step=trainer.step)
            trainer.save_alone()
    finally:  # whatever is wrong with the rest, as after a collective that was aborted
        trainer.status.end(State.FAILED, str(fault), fault.code)


def open_metrics(trainer: Trainer, folder: RunFolder) -> Metrics:
    """Rank 0 brings the run's folder to the step at which training starts, and records there; the
    others record nothing.
    """
    if not trainer.world.is_first:
        return Metrics()
    resume.enter(folder, trainer.step, trainer.config.checkpoint.resume)
    # Now: the best may be one of those just set aside.
    trainer.checkpoints.best_val_loss = choose_best(folder.checkpoints, trainer.config.eval.tokens)
    peak, config = trainer.throughput.peak_flops, trainer.config
    trainer.status.resumed(peak_flops=peak, max_steps=config.train.max_steps)
    others: list[Metrics] = [Tracker(name, config) for name in config.log.also if is_installed(name, "log.also")]
    if config.log.tensorboard and is_installed("tensorboard", "log.tensorboard"):
        board = TensorBoard(folder, trainer.step)
        board.describe(config, reference_losses(folder, trainer.mixture))
        others.append(board)
    metrics = FileMetrics(folder, others)
    metrics.write_event("start", trainer.step)
    version = code_version()
    if folder.version.exists() and (before := folder.version.read_text().strip()) != version:
        logger.info("note: trained until now by code %s, from here on by %s", before, version)
    write_atomic(folder.version, f"{version}\n".encode())
    write_atomic(folder.config, to_toml(trainer.config).encode())
    return metrics
