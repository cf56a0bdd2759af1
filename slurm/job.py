"""One batch job: what SLURM is asked for, our script with that filled in, its submission."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from pipeline.config.load import config_from_arguments
from pipeline.errors import UserError
from pipeline.log import logger
from slurm import sbatch

# How a comment starts that names the folders of a job's runs.
RUNS = "pipeline:"
# How text is read and written that holds names of files, of any user: they need not be UTF-8.
NAMES = "surrogateescape"
# The variables of a job's environment that hold for the cluster and not for that job alone.
OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_WORKING_CLUSTER"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What SLURM is asked for; an empty field leaves the choice to the script or the site."""

    time: str
    nodes: int = 1
    gpus_per_node: str = ""  # [TYPE:]N
    cpus_per_task: int | None = None
    partition: str = ""
    account: str = ""
    job_name: str = ""
    array: str = ""
    after: str = ""  # the id of a job that has to succeed first
    others: tuple[str, ...] = ()  # OPTION or OPTION=VALUE, passed on to sbatch
    folders: tuple[Path, ...] = ()  # of its runs or its dataset

    @property
    def options(self) -> dict[str, str]:
        """By sbatch's names."""
        every = {
            "job-name": self.job_name, "nodes": str(self.nodes), "gpus-per-node": self.gpus_per_node.removeprefix("0"),
            "cpus-per-task": str(self.cpus_per_task or ""), "time": self.time, "partition": self.partition,
            "account": self.account, "array": self.array, "dependency": self.after and f"afterok:{self.after}",
            # Otherwise it would stay in the queue for ever once that job has failed, and block the
            # next attempt.
            "kill-on-invalid-dep": self.after and "yes",
            "comment": comment_on(self.folders) if self.folders else "",
        }  # fmt: skip
        others = {name: value for name, _, value in (other.partition("=") for other in self.others)}
        return {name: value for name, value in every.items() if value} | others

    @property
    def gpus(self) -> int:
        """GPUs on each node, of any type."""
        requests = [gpus for gpus in (self.gpus_per_node, *map(sbatch.gpus_of, self.others)) if gpus]
        if not requests:
            raise UserError("Missing option '--gpus-per-node': expected [TYPE:]N, 0 for none; or --sbatch gres=gpu:N")
        if len(requests) > 1:
            raise UserError(
                f"GPUs are requested {len(requests)} times: give --gpus-per-node or --sbatch gres=gpu:N, once"
            )
        count = sbatch.gpu_count(requests[0])
        if count is None:
            raise UserError(f"invalid --gpus-per-node {requests[0]!r}: expected N or TYPE:N, such as 8 or h100:4")
        return count

    @property
    def ranks_per_node(self) -> int:
        """As train.sbatch starts them: one for each GPU, or one on a node without."""
        ranks = os.environ.get("RANKS_PER_NODE") or str(self.gpus or 1)
        if not ranks.isdigit() or int(ranks) < 1:
            raise UserError(f"invalid RANKS_PER_NODE={ranks}: unset it, or set it to 1 or more")
        return int(ranks)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Script:
    """One of our batch scripts, filled in: its options, and its text."""

    options: dict[str, str]
    text: str

    @property
    def cpus(self) -> int:
        """CPUs of each node, where one task runs; 1 if the script does not say."""
        count = sbatch.values(self.text).get("cpus-per-task", "")
        return int(count) if count.isdigit() else 1

    def log(self, job_id: str) -> str:
        """The file SLURM logs to, as a shell word, with `*` for the index of an array element."""
        pattern = sbatch.values(self.text).get("output", sbatch.SLURMS_LOG)
        known = {"%x": self.options["job-name"], "%j": job_id, "%A": job_id, "%a": "*"}
        return re.sub(r"([^\w./%*+:@-])", r"\\\1", sbatch.file_name(pattern, known))

    def submit(self, *extra: str) -> str:
        """The job's id. Raises UserError with sbatch's reason."""
        # Also on the command line, because SBATCH_* variables override a script's own lines.
        options = [sbatch.option(name, value) for name, value in self.options.items()]
        done = subprocess.run(
            ["sbatch", "--parsable", *options, *extra],
            input=self.text, env=_environment(), capture_output=True, errors=NAMES, check=False,
        )  # fmt: skip
        message = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        if done.returncode:
            raise UserError(f"sbatch rejected the job: {message or f'exit code {done.returncode}'}")
        if message:
            logger.warning("warning: sbatch: %s", message)
        return done.stdout.strip().partition(";")[0]  # then the cluster's name, where there are several


def fill(name: str, job: Job, arguments: list[str], lead_s: int = 0) -> Script:
    """The script `name` for a job. Its signal comes at least `lead_s` before the time limit."""
    text = sbatch.find(name).read_text(encoding="utf-8")
    options = job.options
    values = sbatch.values(text) | options
    if job.array:
        options["output"] = values.get("output", sbatch.SLURMS_LOG).replace("%j", "%A_%a")
    if "signal" in values and lead_s > sbatch.early_signal(values["signal"]).lead_s:
        options["signal"] = f"{values['signal'].partition('@')[0]}@{lead_s}"
    python = os.environ.get("PYTHON") or sys.executable  # this one, unless the user names another
    prologue = [
        "# Filled in by `pipeline submit`. sbatch's command line may add arguments after the file name.",
        f"export PYTHON={shlex.quote(python)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in os.environ.items() if name == "PIPELINE_SITE"),
        f'set -- {shlex.join(arguments)} "$@"',
        "",
    ]
    return Script(options, sbatch.fill(text, options, prologue))


@dataclass(frozen=True)
class Queued:
    """A job in the queue, waiting or at work, and the folders of its runs or its dataset."""

    job_id: str
    array_id: str  # equal for the elements of an array; elsewhere the job's
    state: str
    folders: frozenset[str]


def comment_on(folders: Iterable[Path]) -> str:
    """By which other jobs recognise the runs of a job, whatever its name. Quoted as in a URL: `:`
    divides the folders, and `|` the columns of squeue.
    """
    return RUNS + ":".join(quote(os.fsencode(folder.absolute())) for folder in folders)


def queued() -> Iterator[Queued]:
    """Our jobs in the queue, of any user. Raises nothing: a queue that does not answer is empty."""
    for line in ask(["squeue", "--all", "--noheader", "--format=%A|%F|%T|%k|%Z|%o"]).splitlines():
        job_id, array_id, state, comment, folder, command = (line.split("|", 5) + [""] * 5)[:6]
        if comment.startswith(RUNS):
            yield Queued(job_id, array_id, state, frozenset(map(_unquoted, comment.removeprefix(RUNS).split(":"))))
        elif Path(command.partition(" ")[0]).name == "train.sbatch" and folder == str(Path.cwd()):
            # `sbatch train.sbatch` by hand, which sets its comment once it starts.
            words = re.sub(r"--(resume|stage)[= ]\S+", "", command.partition(" ")[2]).split()
            with suppress(UserError):
                yield Queued(job_id, array_id, state, frozenset([str(config_from_arguments(words).run_dir.absolute())]))


def _unquoted(folder: str) -> str:
    return os.fsdecode(unquote_to_bytes(folder))


def shown(job_id: str) -> dict[str, str]:
    """What `scontrol show job` prints, such as JobState and Reason: UNKNOWN for a job that SLURM
    does not have; empty where it does not answer.
    """
    text = ask(["bash", "-c", 'scontrol show job "$1" 2>&1', "bash", job_id])
    return {"JobState": "UNKNOWN"} if "Invalid job id" in text else dict(re.findall(r"(\w+)=(\S+)", text))


def ask(command: list[str]) -> str:
    """What a SLURM command prints; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, errors=NAMES, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _environment() -> dict[str, str]:
    """This process's environment without that of the job, or the shell of salloc, in which it runs.

    sbatch passes it on, and SLURM neither sets nor unsets what does not concern the new job: an
    array index, a restart count, the cores of a step or the address of its ranks would be taken for
    the new job's.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    of_this_job = {name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))} - OF_THE_CLUSTER
    return {name: value for name, value in os.environ.items() if name not in of_this_job}
