"""The commands that look and change nothing: inspect, verify, doctor."""

from pathlib import Path

import click

from pipeline.cli.command import PATH, Argument, Command

GROUP = "Looking"


@click.command(cls=Command, group=GROUP, example="pipeline inspect data/openwebtext")
@click.argument(
    "path", cls=Argument, type=PATH, help="A dataset or its name, a shard, or a checkpoint or Hugging Face folder."
)
@click.option("--json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, json: bool) -> None:
    """Show what is in a dataset, shard or checkpoint.

    Of token ids: counts, lengths, frequent tokens, how some documents begin, and the quality of the
    text.
    """
    from observe.inspect import run

    run(path, json)


@click.command(cls=Command, group=GROUP, example="pipeline verify runs/gpt2-124m/checkpoints/step_00001000")
@click.argument("path", cls=Argument, type=PATH, help="A dataset or its name, a shard or a checkpoint.")
def verify(path: Path) -> None:
    """Read every byte again and check all that the manifest promises.

    The exit code is 2 if a promise is broken.
    """
    from observe.verify import run

    run(path)


@click.command(cls=Command, group=GROUP, example="pipeline doctor\npipeline doctor --slurm job.sbatch")
@click.option("--slurm", metavar="FILE", type=PATH, help="Check this batch script instead, yours or ours.")
@click.option("--json", is_flag=True, help="Print one JSON list of what was found.")
def doctor(slurm: Path | None, json: bool) -> None:
    """Check whether this machine is fit to train on.

    Versions, limits, disks, network, GPUs and speed; or a batch script for known mistakes. The exit
    code is 2 if a check fails.
    """
    if slurm is not None:
        from slurm.doctor import run as check_script

        check_script(slurm, json)
        return
    from observe.doctor.run import run

    run(json)
