"""The commands that look and change nothing: inspect, verify, plan, doctor."""

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


@click.command(cls=Command, group=GROUP, example="pipeline plan gpt2-124m --on h100x8 --price-per-gpu-hour 2.5")
@click.argument(
    "arguments", cls=Argument, metavar="[CONFIG|RUN] [SECTION.KEY=VALUE]...", nargs=-1,
    help="As for pipeline train; or a run, to set its plan next to what it measured.",
)  # fmt: skip
@click.option(
    "--on", metavar="KIND[xN]", help="Hardware, N ranks: h100x8, a100-40x16, 4090, cpu. [default: this machine]"
)
@click.option("--measure", is_flag=True, help="Measure for ten seconds how long a step takes on this machine.")
@click.option("--price-per-gpu-hour", metavar="X", type=click.FloatRange(min=0), help="For the price of the run.")
@click.option("--time", metavar="LIMIT", help="Time limit of a SLURM job, as for submit. [default: 24:00:00]")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def plan(
    arguments: tuple[str, ...], on: str | None, measure: bool, price_per_gpu_hour: float | None, time: str | None, json: bool
) -> None:  # fmt: skip
    """Estimate the memory, time, disk and price of a run before it starts.

    Every figure is marked as counted, formula, assumed or measured. Needs no GPU.
    """
    from observe.plan.figures import Wish
    from observe.plan.run import run
    from slurm.sbatch import seconds

    limit_s = None if time is None else seconds(time)
    if time is not None and not limit_s:
        raise click.BadParameter(f"expected minutes, h:mm:ss or d-hh:mm:ss, got {time!r}", param_hint="--time")
    wish = Wish(price_per_gpu_hour=price_per_gpu_hour, time_limit_s=limit_s)
    run(arguments, on=on, wish=wish, measured=measure, json=json)


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
