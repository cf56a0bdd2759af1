"""What a login node can find wrong with a job: its options, queue, config, folders and datasets."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path

from pipeline.budget import accumulation_steps
from pipeline.config.keys import Config
from pipeline.config.load import config_from_arguments
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.windows import check_length
from pipeline.errors import UserError
from pipeline.files import holder
from slurm import sbatch
from slurm.doctor import Status, examine
from slurm.job import Job, Script, ask, queued, shown
from slurm.starts import LEAST_WORK

# From SLURM's start of a job to its first step: Python and torch from a shared disk, the ranks' meeting.
START_UP_S = 60
# How options start that --sbatch may not set because the checks rest on them, and the option that
# sets them here.
_BOTH = {f"{name}=": f"--{name}" for name in ("job-name", "cpus-per-task", "time", "partition", "account")}
OF_TRAIN = {
    **_BOTH, "nodes=": "--nodes", "ntasks": "RANKS_PER_NODE", "gpus=": "--gpus-per-node", "gpus-per-node": "--gpus-per-node",
    "gpus-per-socket": "--gpus-per-node", "array=": "--array", "dependency=": "--after",
}  # fmt: skip
OF_PREPARE = {**_BOTH, "nodes=": "--tasks", "array=": "--tasks"}


def configs(arguments: list[str], array: str) -> tuple[list[Config], list[str]]:
    """The config of the job, or of each element of an array, and what is wrong with them."""
    runs, faults = [], []
    for element in map(str, sbatch.elements(array)) if array else [""]:
        try:
            runs.append(config_from_arguments([argument.replace("%a", element) for argument in arguments]))
        except UserError as error:
            faults.append(str(error))
            break  # the others have the same fault
    if not runs and not faults:
        faults.append(f"invalid --array {array!r}: expected indices such as 0-7, 1,3,5 or 0-15%4")
    if len({run.run_dir for run in runs}) < len(runs):
        faults.append(f"elements of --array {array} would share {runs[0].run_dir}: add run.name=NAME-%a")
    return runs, faults


def job_faults(job: Job, own_options: dict[str, str], script: Script, dry_run: bool) -> Iterator[str]:
    """What is wrong with the job's options. `own_options`: those that --sbatch may not set."""
    if not dry_run and shutil.which("sbatch") is None:
        yield "sbatch was not found: submit on a login node, or print the script with --dry-run"
    if "/" in job.job_name:
        yield f"invalid --job-name {job.job_name!r}: the log is named after it, and no folder is created for it"
    for other in job.others:
        if instead := next((option for start, option in own_options.items() if other.startswith(start)), ""):
            yield f"--sbatch {other} is not allowed, because submit checks it: use {instead}"
        elif not re.fullmatch(r"[a-z][a-z-]+(=\S.*)?", other):
            yield f"invalid --sbatch {other!r}: expected OPTION=VALUE or OPTION, such as qos=long or exclusive"
    # The script is ours, but a site may have changed it.
    yield from findings(script, Status.FAIL)
    yield from _partition_faults(job, script.cpus)
    # SLURM takes an id that it does not know for that of a job which has succeeded.
    state = shown(job.after).get("JobState", "") if job.after else ""
    if re.match("UNKNOWN|BOOT_FAIL|CANCELLED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_M|TIMEOUT", state):
        yield f"--after {job.after}: that job is {state.lower()}; name another, or none if it succeeded long ago"


def start_faults(job: Job, script: Script) -> Iterator[str]:
    """Tasks that a site's script has and nothing here counts on; a limit that start-up and the early
    signal use up, so that each start would train for a few steps.
    """
    values, ranks = sbatch.values(script.text), job.ranks_per_node
    if (tasks := values.get("ntasks-per-node", "1")) not in ("1", str(ranks)):
        yield f"--ntasks-per-node={tasks} in the script, for {ranks} rank(s) a node: set it to 1, or that number"
    limit_s, lead_s = sbatch.seconds(job.time) or 0, sbatch.early_signal(values.get("signal", "")).lead_s
    least_s = ceil((START_UP_S + lead_s) / (1 - LEAST_WORK))
    if lead_s < limit_s < least_s:  # up to the lead, that is its own fault
        yield (
            f"--time {job.time} leaves no time to train: {START_UP_S} s to start, the signal {lead_s} s before the end, "
            f"and a tenth for training need {ceil(least_s / 60)} minutes"
        )


def findings(script: Script, status: Status) -> Iterator[str]:
    """What `pipeline doctor` says of the script's directives, errors or warnings."""
    for finding in examine(script.text):
        if finding.status is status:
            yield f"{finding.found}; {finding.advice} (line {finding.line} of the script)"


def _partition_faults(job: Job, cpus: int) -> Iterator[str]:
    """What no node of the partition can give: SLURM would keep the job waiting for ever."""
    # --all: hidden partitions take jobs too.
    listed = ask(["sinfo", "--all", "--noheader", "--exact", "--format=%P|%l|%D|%c"])
    rows = re.findall(r"^(\S+?)(\*?)\|(\S+)\|(\d+)\|(\d+)$", listed, flags=re.MULTILINE)
    limits = {name: limit for name, _, limit, _, _ in rows}
    default = next((name for name, star, *_ in rows if star), "")
    chosen = (job.partition or os.environ.get("SBATCH_PARTITION") or default).split(",")
    if unknown := [name for name in chosen if limits and name not in limits]:
        yield f"unknown partition {', '.join(unknown)}: expected one of {', '.join(limits)}"
    if len(chosen) > 1 or chosen[0] not in limits:  # of several, SLURM takes one that fits
        return
    (name,) = chosen
    limit_s, most_s = sbatch.seconds(job.time), sbatch.seconds(limits[name])
    nodes = sum(int(count) for other, _, _, count, _ in rows if other == name)
    most_cpus = max(int(count) for other, *_, count in rows if other == name)
    if most_s and limit_s and limit_s > most_s:
        yield f"--time {job.time} is over the limit of partition {name}, {limits[name]}"
    if job.nodes > nodes:
        yield f"--nodes {job.nodes} is more than the {nodes} of partition {name}"
    if cpus > most_cpus:
        yield f"--cpus-per-task {cpus} is more than the {most_cpus} of a node of partition {name}"


def nearest(path: Path) -> Path:
    """`path`, or the lowest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def unwritable(folders: Iterable[Path]) -> Iterator[str]:
    """Which of the folders cannot be created or written to, and why."""
    for folder in folders:
        existing = nearest(folder)
        if not existing.is_dir():
            yield f"cannot create {folder}: {existing} is a file; choose another folder"
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield f"cannot write to {folder}: no permission to write to {existing}; choose another folder"


def duplicates(folders: Iterable[Path]) -> Iterator[str]:
    """Another job, or another process, that writes the same run or dataset, whatever it is called."""
    jobs = list(queued())
    for folder in folders:
        same = [job for job in jobs if str(folder.absolute()) in job.folders]
        for job in same[:1]:
            yield (
                f"job {job.job_id}, which is {job.state.lower()}, writes {folder}: wait for it, scancel {job.job_id}, "
                "or choose another name"
            )
        if not same and (holding := holder(folder)):
            yield f"{folder} is being written by {holding}: wait for it, or choose another name"


def run_faults(config: Config, job: Job) -> Iterator[str]:
    """What is wrong with one run's batch, device and datasets."""
    try:
        accumulation_steps(config, job.ranks)
    except UserError as error:
        yield str(error)
    if config.run.device.startswith("cuda") and not job.gpus:
        yield f"run.device={config.run.device} with --gpus-per-node 0: ask for GPUs, or set run.device=auto"
    try:
        if not job.after:  # else that job may still have to write them
            _open_splits(config)
    except UserError as error:
        yield str(error)


def _open_splits(config: Config) -> None:
    """Open what training will open. Raises UserError where it would."""
    for source in Mixture(config).sources:
        if config.eval.every_steps:
            tokens = source.manifest.count("val", "tokens")
            check_length(source.folder, "val", tokens, config.model.block_size)
