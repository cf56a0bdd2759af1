"""The program: its commands, and what each way to end means as an exit code and a line on
stderr.
"""

import sys
import traceback
from io import TextIOWrapper
from typing import NoReturn

import click
from click.shell_completion import get_completion_class

import pipeline
from pipeline import launch, log
from pipeline.cli import data, jobs, looks, models, training
from pipeline.cli.command import Group
from pipeline.errors import EXIT_INTERRUPTED, EXIT_USER, as_failure
from pipeline.machine.cores import share_cores

COMPLETION_VARIABLE = "_PIPELINE_COMPLETE"  # by which a shell asks for completions


def main() -> None:
    """Run one command. Exit codes: 0 done, 2 the user can fix it (one line on stderr), 3 diverged,
    75 the same command may succeed later, 1 our bug.
    """
    share_cores()
    log.configure()
    _settle_encoding()
    try:
        _run()
    except SystemExit as left:
        if left.code and not launch.is_alone():
            # The interpreter's own end would wait for threads and connections to ranks that are gone.
            launch.end_process(int(left.code))
        raise


def _run() -> None:
    try:
        code = app.main(prog_name="pipeline", complete_var=COMPLETION_VARIABLE, standalone_mode=False)
        if code == EXIT_INTERRUPTED:
            _exit("interrupted", EXIT_INTERRUPTED)
    except click.ClickException as error:
        _exit(_usage_error(error), EXIT_USER)
    except Exception as error:
        if (failure := as_failure(error)) is not None:
            _exit(str(failure), failure.code)
        if launch.is_alone():
            raise
        traceback.print_exc()
        launch.leave(1)


def _usage_error(error: click.ClickException) -> str:
    """What is wrong with the command line, and the help page that says what is right."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "pipeline"
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and command == "pipeline train":
        # nanoGPT and Hugging Face have flags where we have config keys: --max_iters, --learning-rate.
        message = training.key_hint(error) or message
    return f"{message.rstrip('.')} (see {command} --help)"


def _settle_encoding() -> None:
    """Text on stdout is UTF-8 in a file or a pipe, whatever the locale, and names of files keep their
    bytes; a terminal shows escaped what it has no sign for.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        if sys.stdout.isatty():
            sys.stdout.reconfigure(errors="backslashreplace")
        else:
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


def _exit(message: str, code: int) -> NoReturn:
    log.logger.error("error: %s", log.printable(" ".join(message.splitlines())))
    launch.leave(code)


def _print_completion(context: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    if shell is not None:
        kind = get_completion_class(shell)
        assert kind is not None
        click.echo(kind(app, {}, "pipeline", COMPLETION_VARIABLE).source())
        context.exit()


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"]},
    example="pipeline quickstart\npipeline train --help        options and config keys of one command",
)  # fmt: skip
@click.version_option(pipeline.__version__, message="pipeline %(version)s", help="Print the version.")
@click.option(
    "--show-completion", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]), is_eager=True, expose_value=False,
    callback=_print_completion, help="Print the completion script of bash, zsh or fish.",
)  # fmt: skip
def app() -> None:
    """Train a GPT from raw text: prepare the text, train on it, sample from the model."""


for command in (
    data.prepare, data.merge, data.fetch, training.train, training.config, training.quickstart, models.sample,
    models.evaluate, models.export, looks.plan, looks.runs, looks.watch, looks.report, looks.inspect, looks.verify,
    jobs.submit, looks.doctor, jobs.batch,
):  # fmt: skip
    app.add_command(command)
