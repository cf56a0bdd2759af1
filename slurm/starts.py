"""Before and after each start of a training job: may it train, and does its job go on?

runs/NAME/slurm.json     the job that trains the run, and what its last start began with
          ranks/srun.log what srun reported of the tasks of the last start, the first failure first
          ranks/rank-N.log  what each rank printed, with a line for each start
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from pipeline.errors import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_RETRY, EXIT_USER, UserError
from pipeline.files import holder, write_atomic
from pipeline.log import logger
from pipeline.runs import RunFolder, State
from slurm.job import RUNS, ask, comment_on, queued, shown

# After so many starts in a row that trained for less than a tenth of their time, the job ends.
MAX_STALLED_STARTS = 2
LEAST_WORK = 0.1
EXIT_STALLED = 65  # EX_DATAERR of sysexits.h
EXIT_TERMINATED = 128 + signal.SIGTERM
# A node is excluded once it has ended so many starts of a job; at once if the fault is the machine's.
MOST_FAILURES = 2
FAILED_CHECK = re.compile(r"node (\S+) failed its check")
# What CUDA and the driver say of a GPU that is broken.
HARDWARE = re.compile(
    r"uncorrectable ECC|\bXid\b|fallen off the bus|unspecified launch failure|CUDA error: unknown error"
)
HEADER = re.compile(r"^--- (start \d+ of job \S+) on (\S+)$", re.MULTILINE)
# SLURM takes a moment to end the job whose node died: only then does it no longer say RUNNING.
SETTLE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """slurm.json: what the last start began with. `failures`: starts that each node ended."""

    job: str
    began_at: float
    checkpoint: str = "none"
    stalled: int = 0
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskEnd:
    """How a task ended: its exit code, its node, and what srun printed."""

    code: int
    node: str = ""
    what: str = ""


def begin(folder: RunFolder, job: str, restarts: int) -> int:
    """Record a start. Returns EXIT_STALLED if the last ones achieved nothing. Raises UserError if
    another job trains the run, before anything in its folder is touched.
    """
    run, mine = str(folder.path.absolute()), os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    for other in queued():
        if other.state == "RUNNING" and other.array_id != mine and run in other.folders:
            raise UserError(f"{run} is being trained by job {other.job_id}: wait for it, or choose another run.name")
    # A requeued start may meet the last ranks of the one before, for which training waits.
    if not restarts and (holding := holder(folder.path)):
        raise UserError(f"{folder.path} is being written by {holding}: wait for it, or choose another run.name")
    # Set here for `sbatch train.sbatch`, and for one element of an array; a user's own is kept.
    if ask(["squeue", "--noheader", f"--job={job}", "--format=%k"]).strip().startswith(("(null)", RUNS)):
        ask(["scontrol", "update", f"JobId={job}", f"Comment={comment_on([folder.path])}"])
    last = _read(folder)
    stalled, failures = 0, {}
    if last is not None and last.job == job and restarts:
        stalled, failures = _stalled(folder, last), last.failures
    now = _latest(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    _write(folder, Start(job=job, began_at=time.time(), checkpoint=now, stalled=stalled, failures=failures))
    return EXIT_STALLED if _is_over(stalled, now) else 0


def end(folder: RunFolder, job: str, code: int, ended_by_slurm: bool) -> int:
    """Requeue the job after a start that stopped for its time limit, or crashed. Returns the exit
    code of the script; `code` is srun's, 143 if any task was ended by SIGTERM.
    """
    last, status = _read(folder) or Start(job=job, began_at=0.0), folder.read_status()
    if status is None or folder.status.stat().st_mtime < last.began_at:
        status = None  # of an earlier start: this one did not come to train
    stopped = status is not None and status.state is State.STOPPED
    if code == 0 and not stopped:
        return 0
    failure = TaskEnd(0) if code == 0 else _first_failure(folder, code)
    saved = _latest(folder)
    state = _state_if_not_running(job, settle=code != 0)
    if ended_by_slurm or state:
        logger.info("SLURM ended this start (%s), saved %s: a requeued job resumes from it", state or "SIGTERM", saved)
        return failure.code
    # A preemption that grants grace signals the ranks and not this script. They save, and SLURM
    # requeues only what still runs when the grace is over.
    if ask(["squeue", "--noheader", f"--job={job}", "--Format=PreemptTime"])[:1].isdigit():
        return _requeue(folder, last, TaskEnd(0), f"preempted at {saved}")
    if code == 0:
        assert status is not None
        if status.reason.startswith(("SIGUSR2", "deadline")):
            return _requeue(folder, last, failure, f"the time limit is near, saved {saved}")
        logger.info("stopped on request, saved %s: not requeued; the same command resumes", saved)
        return 0
    if failure.code in (EXIT_USER, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_TERMINATED):
        logger.error("error: training failed (exit code %d) and is not requeued; the reason is above", failure.code)
        return failure.code
    return _requeue(folder, last, failure, f"training crashed ({failure.what or f'exit code {code}'}), saved {saved}")


def _requeue(folder: RunFolder, last: Start, failure: TaskEnd, why: str) -> int:
    """Put the job back into the queue, without a node that has to be avoided."""
    job, stalled = last.job, _stalled(folder, last)
    if _is_over(stalled, why):
        return failure.code or EXIT_STALLED
    excluded: set[str] = set()
    if failure.code:
        excluded, failures = set(_broken_nodes(folder)), dict(last.failures)
        for node in excluded or {failure.node} - {""}:
            failures[node] = failures.get(node, 0) + 1
        excluded |= {node for node, count in failures.items() if count >= MOST_FAILURES}
        _write(folder, replace(last, failures=failures))
    logger.info("%s%s: requeueing job %s, which takes two minutes", "error: " if failure.code else "", why, job)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue ends the script
    if subprocess.run(["scontrol", "requeue", job], check=False).returncode:
        logger.error("error: this site does not requeue: submit the same command again")
        return failure.code or EXIT_RETRY
    if excluded:
        _exclude(job, excluded)
    return 0


def _exclude(job: str, nodes: set[str]) -> None:
    """Have SLURM place the job on other nodes, if its partition has enough of them."""
    found, listed = shown(job), ",".join(sorted(nodes))
    before, partition = found.get("ExcNodeList", "(null)"), found.get("Partition", "")
    available = set(ask(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N"]).split())
    if len(available - nodes) < int(found.get("NumNodes", "1").partition("-")[0]):
        logger.info("warning: %s failed, but partition %s has no other node for the job", listed, partition)
        return
    every = listed if before == "(null)" else f"{before},{listed}"
    # SLURM accepts this for a job that waits, and not for one that runs.
    ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={every}"])
    logger.info("excluded for job %s: %s", job, listed)


def _first_failure(folder: RunFolder, code: int) -> TaskEnd:
    """What ended the start, though all other tasks fail after it and srun exits with the highest
    code, that of SIGTERM: the user's own error or a divergence unless a task was killed before,
    then the first that was killed, then the first that failed.
    """
    failures = [failure for failure in _failures(folder) if failure.code != EXIT_TERMINATED]
    for failure in failures:
        if failure.code > 128 or failure.code in (EXIT_USER, EXIT_DIVERGED):
            return failure
    return failures[0] if failures else TaskEnd(code)


def _failures(folder: RunFolder) -> Iterator[TaskEnd]:
    text = ""
    with suppress(OSError):
        text = (folder.path / "ranks" / "srun.log").read_text(errors="replace")
    for node, tasks, how in re.findall(r"^srun: error: (\S+): (tasks? [\d,-]+): (.+)$", text, re.MULTILINE):
        number = re.fullmatch(r"Exited with exit code (\d+)", how)
        # Else the name of a signal, or Out Of Memory.
        code = int(number[1]) if number else EXIT_TERMINATED if how == "Terminated" else 128 + signal.SIGKILL
        yield TaskEnd(code, node, f"{tasks} on {node}: {how}")


def _broken_nodes(folder: RunFolder) -> Iterator[str]:
    """Nodes that failed their check, or of a rank whose log of this start reports broken hardware."""
    this_start = f"start {os.environ.get('SLURM_RESTART_COUNT')} of job {os.environ.get('SLURM_JOB_ID')}"
    for path in sorted((folder.path / "ranks").glob("rank-*.log")):
        # What comes before the first header, then for each start which it was, its node, its text.
        *_, start, node, text = ["", "", *HEADER.split(path.read_text(errors="replace"))]
        if start == this_start:  # else of a rank that this start, of fewer, does not have
            yield from FAILED_CHECK.findall(text)
            if HARDWARE.search(text):
                yield node


def _state_if_not_running(job: str, *, settle: bool) -> str:
    """The job's state, empty while it runs. `settle`: give SLURM time to notice why a start failed."""
    deadline = time.monotonic() + (SETTLE_S if settle else 0.0)
    while True:
        state = shown(job).get("JobState", "RUNNING")
        if state != "RUNNING":
            return state
        if time.monotonic() >= deadline:
            return ""
        time.sleep(0.5)


def _stalled(folder: RunFolder, last: Start) -> int:
    """How many starts in a row, `last` the latest of them, trained for a small part of their time.
    Checkpoints count, because what comes after the last one is lost; but for the first step of a
    start, which may take a minute to compile.
    """
    gained, status = _step(_latest(folder)) - _step(last.checkpoint), folder.read_status()
    worked = gained > 0
    if worked and status is not None and status.step_s is not None:
        used_s = folder.status.stat().st_mtime - last.began_at
        worked = (gained - 1) * status.step_s >= LEAST_WORK * used_s
    return 0 if worked else last.stalled + 1


def _is_over(stalled: int, why: str) -> bool:
    if stalled >= MAX_STALLED_STARTS:
        text = "error: %s: %d starts in a row made no checkpoint, or trained for less than a tenth of their time: not requeued"
        logger.error(text, why, stalled)
    return stalled >= MAX_STALLED_STARTS


def _latest(folder: RunFolder) -> str:
    try:
        return (folder.checkpoints / "latest").read_text().strip()
    except OSError:
        return "none"


def _step(checkpoint: str) -> int:
    number = checkpoint.removeprefix("step_")
    return int(number) if number.isdigit() else 0


def _read(folder: RunFolder) -> Start | None:
    try:
        return Start(**json.loads((folder.path / "slurm.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write(folder: RunFolder, start: Start) -> None:
    write_atomic(folder.path / "slurm.json", json.dumps(asdict(start)).encode() + b"\n")
