"""The commands that submit SLURM jobs: submit train, submit prepare."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import click

from pipeline import log
from pipeline.cli import data, sweep, training
from pipeline.cli.command import Argument, Command, Group, Shown

AT_LEAST_1 = click.IntRange(min=1)
JOB: dict[str, Shown] = {
    "time": "Time limit of each start: minutes, h:mm:ss or days-h:mm:ss.",
    "cpus_per_task": {"type": AT_LEAST_1, "help": "Cores of each node; by default the script's, at least 4 for each GPU."},
    "partition": "Partition to run in.",
    "account": "Account to charge.",
    "others": {
        "flag": "--sbatch", "metavar": "OPTION[=VALUE]",
        "help": "Another option of sbatch (qos=long, exclusive); may be repeated.",
    },
}  # fmt: skip
# Options that are not ours are arguments: those of the command that the job runs.
PASSED_ON = {"ignore_unknown_options": True}
TRAIN_EXAMPLE = "pipeline submit train gpt2-124m --time 24:00:00 --nodes 2 --gpus-per-node 8"

dry_run_option = click.option("--dry-run", is_flag=True, help="Check, and print the script: sbatch takes it as it is.")


@click.group(cls=Group, group="Cluster", example=TRAIN_EXAMPLE)
def submit() -> None:
    """Check a SLURM job on the login node, then submit it or print it."""


@submit.command(
    cls=Command, options="slurm.job:Job", context_settings=PASSED_ON, example=TRAIN_EXAMPLE,
    shown=JOB
    | {
        # Required, although a job has a default: on a cluster each is somebody's decision.
        "nodes": {"type": AT_LEAST_1, "required": True, "help": "Number of nodes."},
        "gpus_per_node": {"metavar": "[TYPE:]N", "help": "GPUs of each node, 0 for none; or --sbatch gres=gpu:N."},
        "array": {"metavar": "IDS", "help": "Several runs: 0-7, 1,3,5 or 0-15%4; %a in arguments is the number of each."},
        "after": {"metavar": "JOB", "help": "Wait until this job has succeeded; its dataset need not exist yet."},
        "job_name": "By default the run's name.",
    },
)  # fmt: skip
@click.argument(
    "arguments", cls=Argument, metavar="[CONFIG] [SECTION.KEY=VALUE]... [OPTION]...", nargs=-1,
    help="As for pipeline train.",
)  # fmt: skip
@dry_run_option
def train(options: Any, arguments: tuple[str, ...], dry_run: bool) -> None:
    """Submit a training run, which saves and resumes at its time limit.

    The number of the job goes to stdout.
    """
    from slurm.submit import train as submit_run

    parsed = training.train.parse(arguments)
    if parsed["sweeps"]:
        sweep.refuse("a job: use --array, or submit a script that runs it")
    changes = training.config_arguments(parsed["arguments"], parsed["resume"], parsed["from_run"], parsed["depth"])
    stage = None if parsed["stage"] is None else str(parsed["stage"])
    submit_run(list(arguments), config_arguments=changes, stage=stage, job=options, dry_run=dry_run)


@submit.command(
    cls=Command, options="slurm.job:Job", context_settings=PASSED_ON,
    example="pipeline submit prepare openwebtext --time 8:00:00 --tasks 16",
    shown=JOB | {"job_name": "By default the dataset's name."},
)  # fmt: skip
@click.argument(
    "arguments", cls=Argument, metavar="SOURCE... [OPTION]...", nargs=-1, required=True, help="As for pipeline prepare."
)
@click.option(
    "--tasks", default="1", metavar="N[%M]", help="Jobs to share it, M at a time; one more joins their parts."
)
@dry_run_option
def prepare(options: Any, arguments: tuple[str, ...], tasks: str, dry_run: bool) -> None:
    """Submit a preparation, or several jobs that share a dataset.

    The number of the job that ends last goes to stdout.
    """
    from prepare.run import check_before
    from slurm.submit import prepare as submit_preparation

    parts = re.fullmatch(r"([1-9]\d*)(?:%([1-9]\d*))?", tasks)
    if parts is None:
        raise click.BadParameter(f"expected N or N%M, got {tasks!r}", param_hint="--tasks")
    dataset = check_before(data.prepare.parse(arguments)["options"], int(parts[1]))
    submit_preparation(
        list(arguments), dataset=dataset, tasks=int(parts[1]), at_a_time=parts[2] or "", job=options, dry_run=dry_run
    )


@click.command(cls=Command, hidden=True, example="pipeline batch begin runs/gpt2-124m 1234567 0")
@click.argument("question", type=click.Choice(["site", "begin", "end"]))
@click.argument("arguments", nargs=-1)
def batch(question: str, arguments: tuple[str, ...]) -> None:
    """What the batch scripts ask on a node, where the exit code is the answer: `site`, `begin RUN_DIR
    JOB RESTARTS`, `end RUN_DIR JOB CODE ENDED`.
    """
    from pipeline.runs import RunFolder
    from slurm import site, starts

    if question == "site":
        click.echo(site.shell(site.load()), nl=False)
        return
    log.logger.handlers[0].setFormatter(logging.Formatter("train.sbatch: %(message)s"))
    folder, (job, text, *ended) = RunFolder(Path(arguments[0])), arguments[1:]
    number = int(text)
    sys.exit(starts.end(folder, job, number, ended == ["yes"]) if ended else starts.begin(folder, job, number))
