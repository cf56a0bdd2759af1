"""The commands that look and change nothing: inspect, watch, verify, report, doctor."""

from pathlib import Path

import click

from pipeline.cli.command import PATH, Argument, Command

GROUP = "Looking"


@click.command(cls=Command, group=GROUP, example="pipeline inspect data/openwebtext")
@click.argument(
    "path",
    cls=Argument,
    type=PATH,
    help="A dataset or its name, a shard, a checkpoint or Hugging Face folder; with --step a run.",
)
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


@click.command(cls=Command, group="Cluster", example="pipeline doctor --slurm job.sbatch")
@click.option("--slurm", required=True, metavar="FILE", type=PATH, help="Batch script to check, yours or ours.")
@click.option("--json", is_flag=True, help="Print one JSON list of the findings.")
def doctor(slurm: Path, json: bool) -> None:
    """Check a batch script for known mistakes.

    The exit code is 2 if one of them is an error.
    """
    from slurm.doctor import run

    run(slurm, json)
