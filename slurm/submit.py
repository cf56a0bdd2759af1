"""`pipeline submit`: checks a job on the login node, fills in its batch script, then submits or
prints it.

A job waits for hours and then fails within seconds because of a misspelled key, a missing dataset
or a batch size that does not divide. All of that is known before, from files and arithmetic,
without a GPU and without importing torch.
"""

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path

from pipeline.budget import checkpoint_bytes, data_arithmetic, most_checkpoints, outlook, step_arithmetic
from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.runs import RunFolder
from slurm import checks, sbatch, site
from slurm.doctor import Status
from slurm.job import Job, Script, ask, fill, shown

# For exiting and the requeue, after the save.
EXIT_S = 60
# Reasons that end only if someone changes the job, or the rules; https://slurm.schedmd.com/job_reason_codes.html
NEVER = re.compile(r"Invalid|NotAllowed|NeverSatisfied|BadConstraints|Partition(Time|Node)Limit|PerJob")
LOOK_S = 1.0
# A rank computes on one and reads ahead on another; the rest is for NCCL's threads and for saving.
CORES_PER_GPU = 4


def train(arguments: list[str], *, config_arguments: list[str], stage: str | None, job: Job, dry_run: bool) -> None:
    """Check a training job, then print its script or submit it. Raises UserError with all faults.

    `arguments` are those of `pipeline train`; `config_arguments` those of them that make the
    config, `stage` its --stage.
    """
    runs, faults = checks.configs(config_arguments, job.array)
    if stage is not None and not stage.startswith(("/", "$")):
        faults.append(f"invalid --stage {stage!r}: expected an absolute path on the nodes' disks, or '$VARIABLE'")
    job = replace(_completed(job, runs), folders=tuple(run.run_dir for run in runs))
    site.load()  # for its errors, which every script would have
    script = fill("train.sbatch", job, arguments, max(map(_measured_lead_s, runs), default=0))
    faults += checks.job_faults(job, checks.OF_TRAIN, script, dry_run)
    faults += checks.start_faults(job, script)
    faults += [*checks.unwritable([Path(), *job.folders]), *checks.duplicates(job.folders)]
    faults += (fault for run in _distinct(runs) for fault in checks.run_faults(run, job))
    _raise_or_warn(faults, script)
    if script.cpus < job.ranks_per_node:
        crowded = f"{script.cpus} core(s) for the {job.ranks_per_node} ranks of a node"
        logger.warning("warning: %s: each gets less than one, for training and data; raise --cpus-per-task", crowded)
    for run in _distinct(runs):
        logger.info("%s", "\n".join(_arithmetic(run, job)))
    if dry_run:
        sys.stdout.write(script.text)
        return
    job_id = script.submit()
    _raise_if_stuck(job_id)
    dependency = f", and waits for job {job.after}: if that fails, SLURM cancels this one" if job.after else ""
    more = f" and {len(runs) - 1} more" if runs[1:] else ""
    _report(job_id, [
        f"job {job_id} ({job.job_name}) is in the queue{dependency}",
        f"follow   tail -F {script.log(job_id)}",
        f"run      {runs[0].run_dir}{more}: status.json, metrics.jsonl, tb/",
        f"stop     scancel --signal=TERM {job_id}     saves, and does not requeue",
        "resume   the same command again; at the time limit the job does that itself",
    ])  # fmt: skip


def prepare(arguments: list[str], *, dataset: Path, tasks: int, at_a_time: str, job: Job, dry_run: bool) -> None:
    """Check a preparation job, then print its script or submit it; as an array, of which
    `at_a_time` run together, with the job that joins and verifies.

    `arguments` are those of `pipeline prepare`, which has checked them.
    """
    array = f"0-{tasks - 1}{at_a_time and f'%{at_a_time}'}" if tasks > 1 else ""
    job = replace(job, job_name=job.job_name or dataset.name, array=array, gpus_per_node="0", folders=(dataset,))
    site.load()
    script = fill("prepare.sbatch", job, arguments)
    faults = list(checks.job_faults(job, checks.OF_PREPARE, script, dry_run))
    faults += [*checks.unwritable([Path(), dataset]), *checks.duplicates([dataset])]
    _raise_or_warn(faults, script)
    logger.info("%d job(s) make %s, each for %s at a time", tasks, dataset, sbatch.format_time(job.time))
    if dry_run:
        sys.stdout.write(script.text)
        if tasks > 1:
            command = shlex.join([str(sbatch.find("merge.sbatch")), str(dataset)])
            logger.info("then, with the id that sbatch prints: sbatch --dependency=afterany:JOB %s", command)
        return
    first_id = last_id = script.submit()
    _raise_if_stuck(first_id)
    lines = [f"job {first_id} ({job.job_name}) is in the queue", f"follow   tail -F {script.log(first_id)}"]
    if tasks > 1:
        merge = fill("merge.sbatch", replace(job, array="", job_name=f"{job.job_name}-merge"), [str(dataset)])
        try:
            last_id = merge.submit(f"--dependency=afterany:{first_id}")
        except UserError as error:
            raise UserError(
                f"job {first_id} is in the queue, but not the job that joins its parts: {error}; "
                f"when it has ended, run pipeline merge {shlex.quote(str(dataset))}"
            ) from None
        lines.append(f"then     job {last_id} joins and verifies: tail -F {merge.log(last_id)}")
    _report(last_id, [
        *lines,
        f"stop     scancel {first_id}     what is done is kept, and the same command resumes",
        f"train    pipeline submit train data.dataset={shlex.quote(dataset.name)} ... --after {last_id}",
    ])  # fmt: skip


def _completed(job: Job, runs: list[Config]) -> Job:
    """The job with a name, that of its runs, and cores for each GPU."""
    # That of seed-0, seed-1 ... is seed.
    shared_name = os.path.commonprefix([run.run.name for run in runs])  # noqa: RUF071
    cpus = max(fill("train.sbatch", job, []).cpus, CORES_PER_GPU * job.gpus)
    name = job.job_name or shared_name.rstrip("-_.") or "train"
    return replace(job, job_name=name, cpus_per_task=job.cpus_per_task or cpus)


def _distinct(runs: list[Config]) -> list[Config]:
    """One of the runs that differ in name and seed alone."""
    return list({replace(run, run=replace(run.run, name="", seed=0)): run for run in runs}.values())


def _raise_or_warn(faults: list[str], script: Script) -> None:
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))  # two runs may have the same fault
    for warning in checks.findings(script, Status.WARN):
        logger.warning("warning: %s", warning)


def _raise_if_stuck(job_id: str) -> None:
    """Cancels a job that SLURM accepted, and a second later says it will never start."""
    time.sleep(LOOK_S)
    job = shown(job_id)
    if NEVER.search(reason := job.get("Reason", "")) and job.get("JobState") in ("PENDING", "CANCELLED"):
        ask(["scancel", job_id])
        raise UserError(
            f"job {job_id} was cancelled, because it would wait forever: SLURM's reason is {reason}; check --account, "
            "--partition, --time, --nodes and --after, and --sbatch qos=..."
        )


def _report(job_id: str, lines: list[str]) -> None:
    """The id to stdout, for scripts; the rest to stderr, for people."""
    sys.stdout.write(f"{job_id}\n")
    sys.stdout.flush()
    logger.info("%s", "\n".join(lines))


def _arithmetic(config: Config, job: Job) -> Iterator[str]:
    """How the step, the run and the disk space add up, with every factor."""
    gpus = f"{job.gpus} GPU(s) each" if job.gpus else "no GPUs"
    yield f"{job.nodes} node(s), {gpus}: {job.ranks} rank(s), for {sbatch.format_time(job.time)} at a time"
    yield step_arithmetic(config, job.ranks)
    if job.after:  # the dataset does not exist yet
        return
    mixture = Mixture(config)
    for source in mixture.sources:
        yield data_arithmetic(config, source.folder, source.manifest, source.share)
    vocab_size = mixture.tokenizer["vocab_size"]
    yield from outlook(config, vocab_size, job.gpus_per_node.partition(":")[0].lower(), job.ranks)
    size = checkpoint_bytes(config, vocab_size)
    needed = size * most_checkpoints(config)
    yield f"checkpoints of about {size / 1e6:,.1f} MB, {needed / 1e6:,.1f} MB of them at a time"
    folder = RunFolder(config.run_dir).checkpoints
    existing = sum(file.stat().st_size for file in folder.glob("*/*") if file.is_file())
    free = shutil.disk_usage(checks.nearest(config.run_dir)).free
    if free + existing < needed:
        yield f"warning: {config.run_dir} has {free / 1e6:,.0f} MB free: lower checkpoint.keep, or choose another run.dir"


def _measured_lead_s(config: Config) -> int:
    """Seconds for a step, a save and exiting, by an earlier start of the run; 0 without one."""
    status = RunFolder(config.run_dir).read_status()
    if status is None or status.step_s is None or status.last_save_s is None:
        return 0
    return ceil(status.step_s + status.last_save_s + EXIT_S)
