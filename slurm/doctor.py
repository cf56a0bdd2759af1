"""`pipeline doctor --slurm FILE`: #SBATCH directives that cost a job, or its log, without an error
message.

Only what sbatch reads is checked; for the shell part of a script there is shellcheck. A check that
cannot be sure reports nothing: what sbatch's command line or the site's configuration adds is
unknown here.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.log import printable
from slurm import sbatch

# A step and a save of a small run take a minute, and another one is for exiting and the requeue.
LEAST_LEAD_S = 120
NODE_LOCAL = re.compile(r"(/tmp|/var/tmp|/dev/shm)\b")
SECRET = re.compile(r"\b(\w*(?:API_KEY|TOKEN|SECRET|PASSWORD))=[^\s\"'$,]{8,}")


class Status(StrEnum):
    FAIL = "fail"  # the job, or work, is lost
    WARN = "warn"  # it costs time, a log, or only some jobs


@dataclass(frozen=True)
class Finding:
    """One mistake: on which line, what was found and why it matters, how to fix it."""

    status: Status
    line: int
    check: str
    found: str
    advice: str


fail, warn = partial(Finding, Status.FAIL), partial(Finding, Status.WARN)
# The directives of a script by name, and its text.
Named = dict[str, sbatch.Directive]
Check = Callable[[Named, str], Iterator[Finding]]


def interpreter(named: Named, text: str) -> Iterator[Finding]:
    if not text.startswith("#!"):
        found = "the first line names no interpreter: sbatch rejects the script"
        yield fail(1, "no-interpreter", found, "begin it with #!/bin/bash")


def ignored(named: Named, text: str) -> Iterator[Finding]:
    first = sbatch.first_command(text)
    # The lines of a here-document may be those of another script.
    for number, line in enumerate(text.partition("<<")[0].splitlines(), start=1):
        if re.match(r"\s*#SBATCH\s*-", line) and (number > first or line[0].isspace()):
            found = f"ignored: it is {f'after the first command (line {first})' if number > first else 'indented'}"
            yield fail(number, "ignored-directive", found, "move it up, to the left margin")


def unexpanded(named: Named, text: str) -> Iterator[Finding]:
    for option in named.values():
        if "$" in option.value or option.value.startswith("~"):
            found = f"--{option.name}={option.value} is taken literally: no shell reads #SBATCH lines"
            advice = "write the value out, or pass it on sbatch's command line; logs may have %x, %j, %A, %a and %u"
            yield fail(option.line, "unexpanded-directive", found, advice)
        if match := SECRET.search(option.value):
            found = f"{match[1]} is readable: SLURM stores the options of jobs and shows them"
            yield warn(option.line, "secret", found, "let the job read it from a file of mode 0600")


def log_folder(named: Named, text: str) -> Iterator[Finding]:
    start = Path(named["chdir"].value if "chdir" in named else "")
    for option in (named[name] for name in ("output", "error") if name in named):
        job_name = {"%x": named["job-name"].value} if "job-name" in named else {}
        folder = sbatch.file_name(option.value, job_name).rpartition("/")[0]
        # Nobody can create a folder named by a job id in time; one of another pattern, such as %N,
        # may exist.
        numbered = re.search(r"%\d*[Aj]", folder)
        if NODE_LOCAL.match(folder):
            found = f"the log goes to {folder} of the node, out of reach after the job"
            yield warn(option.line, "log-on-node", found, "choose a folder that all nodes share")
        elif numbered or not (re.search(r"[%$~]", folder) or (start / folder).is_dir()):
            found = f"the log folder {folder} does not exist: the job fails at its start without a message"
            advice = "put the job id into the file name" if numbered else f"mkdir -p {folder} before sbatch"
            yield fail(option.line, "log-folder", found, advice)


def requeue(named: Named, text: str) -> Iterator[Finding]:
    if "requeue" in named and not ("open-mode" in named and named["open-mode"].value.startswith("a")):
        found = "--requeue without --open-mode=append: on most sites each start truncates the log of the last one"
        yield warn(named["requeue"].line, "log-truncated", found, "add #SBATCH --open-mode=append")


def tasks(named: Named, text: str) -> Iterator[Finding]:
    if not {"cpus-per-task", "cpus-per-gpu", "exclusive"} & named.keys():
        found = "no --cpus-per-task: a task gets one core, which all its threads share"
        yield warn(1, "no-cpus", found, "add #SBATCH --cpus-per-task=N")
    counts = {name: int(option.value) for name, option in named.items() if option.value.isdigit()}
    per_node = counts.get("ntasks-per-node") or counts.get("ntasks", 1) // (counts.get("nodes") or 1)
    gpus = sbatch.gpu_count(named["gpus-per-node"].value) if "gpus-per-node" in named else None
    # One task may start the ranks of its node, as torchrun does.
    if gpus and per_node > 1 and per_node != gpus:
        found = f"{per_node} tasks a node for {gpus} GPU(s): with one rank a task, GPUs are idle, or shared, which NCCL refuses"
        advice = f"set --ntasks-per-node={gpus}, or 1 for torchrun and for train.sbatch"
        yield fail(named["gpus-per-node"].line, "tasks-and-gpus", found, advice)


def times(named: Named, text: str) -> Iterator[Finding]:
    limit_s = sbatch.seconds(named["time"].value) if "time" in named else None
    if "time" in named and limit_s is None and named["time"].value.upper() not in sbatch.NO_LIMIT:
        found = f"invalid --time {named['time'].value!r}: expected minutes, h:mm:ss or d-hh:mm:ss"
        yield fail(named["time"].line, "time-format", found, "for a day, write 24:00:00")
    if "signal" not in named:
        return
    line, early = named["signal"].line, sbatch.early_signal(named["signal"].value)
    if early.batch_shell_only and not re.search(r"^\s*(trap|source|\.) ", text, re.MULTILINE):
        found = f"--signal={named['signal'].value} goes to the batch shell alone, which traps nothing and exits"
        yield fail(line, "signal-without-trap", found, "remove B:, so that srun's tasks get it")
    found = f"the signal comes {early.lead_s} s before the end"
    if limit_s is not None and limit_s <= early.lead_s:
        yield fail(line, "lead-time", f"{found} of {limit_s} s", "raise --time, or lower the number after @")
    elif early.lead_s < LEAST_LEAD_S:
        advice = f"write @300: a step, a save and a minute to exit have to fit, at least {LEAST_LEAD_S} s"
        yield warn(line, "lead-time", found, advice)


def array(named: Named, text: str) -> Iterator[Finding]:
    if "array" not in named:
        return
    if "output" in named and not re.search(r"%\d*[ajJ]", named["output"].value):
        found = f"all elements of the array write to {named['output'].value}"
        yield warn(named["output"].line, "array-log", found, "put %A_%a into the file name")
    for number, line in enumerate(text.splitlines(), start=1):
        if re.search(r"scontrol\s+requeue\W+SLURM_JOB_?ID", line):
            found = "the whole array is requeued: an element's SLURM_JOB_ID may be the array's"
            advice = "scontrol requeue ${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
            yield fail(number, "array-requeue", found, advice)


CHECKS: tuple[Check, ...] = (interpreter, ignored, unexpanded, log_folder, requeue, tasks, times, array)


def examine(text: str) -> list[Finding]:
    """The mistakes in a script's directives, by line."""
    named = {directive.name: directive for directive in sbatch.directives(text)}
    return sorted((finding for check in CHECKS for finding in check(named, text)), key=lambda finding: finding.line)


def run(path: Path, as_json: bool) -> None:
    """Print what is found, one line each. Raises UserError if a finding is an error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    findings = examine(text)
    errors = sum(finding.status is Status.FAIL for finding in findings)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        for finding in findings:
            level = "error" if finding.status is Status.FAIL else "warning"
            sys.stdout.write(printable(f"{path}:{finding.line}: {level}: {finding.found}; {finding.advice}") + "\n")
        sys.stdout.write(f"{path}: {errors} error(s), {len(findings) - errors} warning(s)\n")
    sys.stdout.flush()
    if errors:
        raise UserError(f"{path} has {errors} error(s), listed above")
