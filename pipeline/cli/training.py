"""The commands that train: train, quickstart."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pipeline import launch, log
from pipeline.cli import sweep
from pipeline.cli.command import PATH, Argument, Command, write_lines
from pipeline.config.depth import MOST_LAYERS, with_depth
from pipeline.config.keys import KEYS, SECTIONS, help_rows
from pipeline.config.load import DEFAULT_CONFIG, config_from_arguments, load_config, preset_files
from pipeline.config.other_names import did_you_mean, keys_for
from pipeline.errors import UserError
from pipeline.runs import RunFolder, find_run

GROUP = "Training"
NEXT_STEPS = """What to try next:
  pipeline sample --ckpt best --prompt 'class ' --num-samples 3      more text from this model
  pipeline eval --ckpt best                                          its loss on all the text it never saw
  pipeline train quickstart run.name=longer train.max_steps=10000    train it for longer
  tensorboard --logdir runs                                          its curves
  pipeline prepare my-texts/ --name mine --tokenizer byte            your own text ...
  pipeline train quickstart data.dataset=mine run.name=mine          ... and a model of it"""


class Train(Command):
    """Its help also lists the presets, each with the first line of its file, and the config keys."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        titles = {name: path.read_text(encoding="utf-8").splitlines()[0] for name, path in preset_files().items()}
        write_lines(formatter, "Presets", [f"{name:<24} {title.strip('# .')}" for name, title in titles.items()])
        for section in SECTIONS:
            lines = [f"{name:<24} {text}" for name, text in help_rows(section)]
            write_lines(formatter, f"Keys of [{section}], given as {section}.KEY=VALUE", lines)


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """In a shell: presets and keys, or else files."""
    words = [*preset_files(), *(f"{key}=" for key in KEYS)]
    fitting = [CompletionItem(word) for word in words if word.startswith(incomplete)]
    return fitting or [CompletionItem(incomplete, type="file")]


config_argument = click.argument(
    "arguments", cls=Argument, metavar="[CONFIG] [SECTION.KEY=VALUE]...", nargs=-1, shell_complete=_complete,
    help=f"A preset's name or a TOML file [default: {DEFAULT_CONFIG}], then changes to it.",
)  # fmt: skip

depth_option = click.option(
    "--depth", metavar="N", type=click.IntRange(min=1, max=MOST_LAYERS),
    help="One dial: N layers set width, heads, learning rate, decay, batch and steps; keys that are given win.",
)  # fmt: skip


def config_arguments(
    arguments: Sequence[str], resume: str | None, from_run: str | None = None, depth: int | None = None
) -> list[str]:
    """The arguments of `train` that make its config; with `from_run`, that of a new run like this one."""
    changes = [*arguments, *([] if resume is None else [f"checkpoint.resume={resume}"])]
    if depth is not None:
        if from_run is not None:
            raise UserError(f"got --from {from_run} and --depth {depth}, which both set the model: give one of them")
        return with_depth(changes, depth)
    if from_run is None:
        return changes
    if arguments and "=" not in arguments[0]:
        raise UserError(f"got the config {arguments[0]} and --from {from_run}: give one of them")
    run = find_run(from_run)
    if not run.config.is_file():
        raise UserError(f"--from {from_run}: there is no {run.config}")
    name = run.path.resolve().name
    if f"run.name={name}" in arguments:
        raise UserError(
            f"--from {from_run} begins a new run: choose another run.name, or resume it: train {run.config}"
        )
    # The same command again has the same name, so it resumes; other changes have another one.
    new = sweep.name_with(name, arguments) if arguments else f"{name}-2"
    return [str(run.config), f"run.name={new}", "checkpoint.resume=auto", *changes]


def key_hint(error: click.NoSuchOption) -> str:
    """What to type for an option that `train` does not have, where it is the name of a config key;
    else nothing.
    """
    option = error.option_name
    if not keys_for(option):
        return ""
    return f"No such option '{option}': config keys are given as SECTION.KEY=VALUE{did_you_mean(option, '=VALUE')}"


@click.command(
    cls=Train, group=GROUP, on_ranks=True,
    example="pipeline train quickstart optimizer.lr=1e-3 run.name=slower\n"
    "torchrun --nproc_per_node 8 -m pipeline train gpt2-124m",
)  # fmt: skip
@config_argument
@click.option("--resume", metavar="HOW", help=f"{KEYS['checkpoint.resume'].metadata['text']}: sets checkpoint.resume.")
@click.option("--dry-run", is_flag=True, help="Check everything and print what would run; write nothing.")
@click.option(
    "--stage", metavar="DIR", type=PATH,
    help="Copy the datasets to this folder on each node's own disk, such as '$SLURM_TMPDIR', and read them there.",
)  # fmt: skip
@click.option("--from", "from_run", metavar="RUN", help="Begin a new run with the config of this one, and the changes.")
@depth_option
@click.option(
    "--sweep", "sweeps", metavar="KEY=V1,V2,...", multiple=True,
    help="One run for each value, in turn, then a table of them; several options make a grid.",
)  # fmt: skip
@click.option("--print-run-dir", is_flag=True, help="Print the run's folder, for scripts, and exit.")
def train(
    arguments: tuple[str, ...], resume: str | None, dry_run: bool, stage: Path | None, *,
    from_run: str | None, depth: int | None, sweeps: tuple[str, ...], print_run_dir: bool,
) -> None:  # fmt: skip
    """Train a model on a prepared dataset.

    Each process of torchrun, or task of srun, is a rank. A run that was stopped or killed is
    resumed by the same command.
    """
    try:
        changes = config_arguments(arguments, resume, from_run, depth)
        if sweeps:
            options = ["--dry-run"] * dry_run + ([] if stage is None else ["--stage", str(stage)])
            if print_run_dir:
                sweep.refuse("a batch script")
            sweep.run(changes, sweeps, options)
            return
        config = config_from_arguments(changes)
    except UserError:
        if launch.rank():  # it read the same arguments as rank 0
            launch.leave_to_first()
        raise
    if print_run_dir:
        click.echo(config.run_dir.absolute())
        return
    # Imported after the checks, as torch takes seconds from a shared disk.
    from sample.preview import preview
    from train.run import run

    run(config, dry_run=dry_run, stage_to=stage, preview=preview)
    if not dry_run and launch.rank() == 0:
        print_result(config.run_dir)


def print_result(folder: Path) -> None:
    """How a run ended, as one JSON line for scripts."""
    if status := RunFolder(folder).read_status():
        names = ("state", "reason", "step", "tokens", "loss", "val_loss", "bits_per_byte")
        result = {"run": str(folder), **{name: getattr(status, name) for name in names}, "seconds": status.trained_s}
        click.echo(json.dumps(result))


@click.command(
    cls=Command,
    group=GROUP,
    example="pipeline config gpt2-124m optimizer.lr=3e-4 > mine.toml\npipeline train mine.toml",
)
@config_argument
@click.option("--json", is_flag=True, help="Print one JSON object: value, origin, meaning and range of each key.")
def config(arguments: tuple[str, ...], json: bool) -> None:
    """Print the resolved config with origin and meaning of each value.

    What is printed is a config file: pipeline train takes it.
    """
    from observe.config import run

    run(arguments, json)


@click.command(cls=Command, group=GROUP, example="pipeline quickstart")
def quickstart() -> None:
    """Prepare, train and sample in a few minutes, without a download.

    The text is the source code of Python's standard library.
    """
    from prepare.options import PrepareOptions
    from prepare.run import run as run_prepare
    from sample.options import SampleOptions
    from sample.preview import preview
    from sample.run import run as run_sample
    from train.run import run as run_train

    config = load_config("quickstart", [])
    log.logger.info("1/3 prepare: the standard library's source, one token a byte")
    run_prepare(PrepareOptions(["stdlib"], name=config.data.dataset, tokenizer="byte"))
    log.logger.info("2/3 train: a small GPT, a few minutes on two cores")
    if run_train(config, preview=preview):
        return  # stopped on request; the same command resumes
    log.logger.info("3/3 sample: what it writes after 'def '")
    options = SampleOptions(ckpt="best", prompts=["def "], max_new_tokens=400, temperature=0.7, seed=1)
    run_sample(replace(options, run_dir=config.run_dir))
    log.logger.info(NEXT_STEPS)
