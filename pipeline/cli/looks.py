"""The commands that look and change nothing: plan, watch, runs, report, inspect, verify, doctor."""

from pathlib import Path

import click

from pipeline.cli.command import PATH, Argument, Command
from pipeline.cli.training import depth_option
from pipeline.config.depth import with_depth

GROUP = "Looking"


@click.command(cls=Command, group=GROUP, example="pipeline inspect data/openwebtext")
@click.argument(
    "path", cls=Argument, type=PATH,
    help="A dataset or its name, a shard, a checkpoint or Hugging Face folder; with --step a run.",
)  # fmt: skip
@click.option("--step", metavar="N", type=click.IntRange(min=0), help="Of a run: the texts of the batch of step N.")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, step: int | None, json: bool) -> None:
    """Show what is in a dataset, shard, checkpoint or step of a run.

    Of token ids: counts, lengths, frequent tokens, how some documents begin, and the quality of the
    text. A step is counted as in bad_steps.jsonl: step 0 is the first.
    """
    from observe import inspect, steps

    if step is None:
        inspect.run(path, json)
    else:
        steps.run(path, step, json)


@click.command(cls=Command, group=GROUP, example="pipeline watch\npipeline watch gpt2-124m runs/other --once --json")
@click.argument(
    "runs", cls=Argument, metavar="[RUN]...", nargs=-1,
    help="A name under runs/, or a folder [default: all that are running, or else the newest].",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print them once and exit, as where stdout is not a terminal.")
@click.option("--json", is_flag=True, help="Print one JSON list and exit.")
def watch(runs: tuple[str, ...], once: bool, json: bool) -> None:
    """Show runs while they train, from any terminal or node.

    Only their files are read. One run is a panel, several are rows. A run whose status.json is a
    minute old is dead.
    """
    from observe.watch import run

    run(runs, once, json)


@click.command(cls=Command, group=GROUP, example="pipeline verify runs/gpt2-124m/checkpoints/step_00001000")
@click.argument("path", cls=Argument, type=PATH, help="A dataset or its name, a shard or a checkpoint.")
def verify(path: Path) -> None:
    """Read every byte again and check all that the manifest promises.

    The exit code is 2 if a promise is broken.
    """
    from observe.verify import run

    run(path)


@click.command(cls=Command, group=GROUP, example="pipeline report gpt2-124m gpt2-124m-lr1e-3 --png loss.png")
@click.argument(
    "runs", cls=Argument, metavar="RUN [RUN]...", nargs=-1, required=True, help="Names under runs/, or folders of runs."
)
@click.option("--out", type=PATH, default=Path("report.html"), help="The page. [default: report.html]")
@click.option("--png", type=PATH, help="Also write the loss curve as PNG, 300 dots per inch.")
@click.option("--svg", type=PATH, help="Also write the loss curve as SVG.")
def report(runs: tuple[str, ...], out: Path, png: Path | None, svg: Path | None) -> None:
    """Write one or several runs as one HTML page.

    It has curves, what differs in the configs, samples and data, needs no network, and may be mailed
    as it is. Its path goes to stdout.
    """
    from observe.report.run import run

    run(runs, out, png=png, svg=svg)


@click.command(cls=Command, group=GROUP, example="pipeline runs --where optimizer.lr=3e-4 --sort best_val_loss")
@click.argument(
    "folder", cls=Argument, type=PATH, required=False, help="Folder with runs, up to four levels down [default: runs]."
)
@click.option(
    "--where", metavar="KEY=VALUE", multiple=True,
    help="Only runs with this config value or column; text may have * and ?; may be repeated.",
)  # fmt: skip
@click.option(
    "--sort",
    metavar="[-]KEY",
    default="age_s",
    show_default=True,
    help="Column or config key; - for the largest first.",
)
@click.option("--json", is_flag=True, help="Print one JSON list of objects.")
def runs(folder: Path | None, where: tuple[str, ...], sort: str, json: bool) -> None:
    """List all runs: state, losses, speed, how their configs differ.

    A run whose status.json says running, and has not been updated for a minute, is dead.
    """
    from observe.runs import run

    run(folder, where, sort, json)


@click.command(cls=Command, group=GROUP, example="pipeline plan gpt2-124m --on h100x8 --price-per-gpu-hour 2.5")
@click.argument(
    "arguments", cls=Argument, metavar="[CONFIG|RUN] [SECTION.KEY=VALUE]...", nargs=-1,
    help="As for pipeline train; or a run, to set its plan next to what it measured.",
)  # fmt: skip
@click.option(
    "--on", metavar="KIND[xN]", help="Hardware, N ranks: h100x8, a100-40x16, 4090, cpu. [default: this machine]"
)
@depth_option
@click.option("--measure", is_flag=True, help="Measure for ten seconds how long a step takes on this machine.")
@click.option("--price-per-gpu-hour", metavar="X", type=click.FloatRange(min=0), help="For the price of the run.")
@click.option("--time", metavar="LIMIT", help="Time limit of a SLURM job, as for submit. [default: 24:00:00]")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def plan(
    arguments: tuple[str, ...], on: str | None, depth: int | None, measure: bool, *,
    price_per_gpu_hour: float | None, time: str | None, json: bool,
) -> None:  # fmt: skip
    """Estimate memory, time, disk and price of a run before it starts.

    Every figure is marked as counted, formula, assumed or measured. Needs no GPU.
    """
    from observe.plan.run import run
    from slurm.sbatch import seconds

    limit_s = None if time is None else seconds(time)
    if time is not None and not limit_s:
        raise click.BadParameter(f"expected minutes, h:mm:ss or d-hh:mm:ss, got {time!r}", param_hint="--time")
    changes = list(arguments) if depth is None else with_depth(arguments, depth)
    run(changes, on=on, measured=measure, json=json, price_per_gpu_hour=price_per_gpu_hour, time_limit_s=limit_s)


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
