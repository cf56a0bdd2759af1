"""`train --sweep`: one run after the other on this machine, each in a process, so that none can take the others down.

Every run is that of `pipeline train` with its values and a name that has them, and is resumed in the
same way: the same command goes on where the sweep ended.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

import pipeline
from pipeline import launch
from pipeline.config.keys import Config
from pipeline.config.load import config_from_arguments, to_toml
from pipeline.errors import EXIT_DIVERGED, Diverged, UserError
from pipeline.log import logger
from pipeline.runs import RunFolder, State

# A comma that no ] follows without a [ before it, nor an odd number of quotes.
SEPARATOR = re.compile(r',(?![^\[]*\])(?=(?:[^"]*"[^"]*")*[^"]*$)')


def refuse(where: str) -> NoReturn:
    raise UserError(f"--sweep starts one process after the other, so it does not work in {where}")


def run(arguments: list[str], sweeps: Sequence[str], options: list[str]) -> None:
    """Train the runs of `pipeline train ARGUMENTS OPTIONS --sweep ...`, then print their table. Raises
    UserError, Diverged.
    """
    if not launch.is_alone() or "RANK" in os.environ:
        refuse("torchrun or srun: start it alone, or start each run by itself")
    runs = [named(arguments, changes) for changes in variants(sweeps)]
    if len({config.run_dir for _, config in runs}) < len(runs):
        raise UserError(
            "runs of the sweep would have the same name: their values differ in signs that no name may have"
        )
    codes, child, dry = {}, Child(), "--dry-run" in options
    for number, (words, config) in enumerate(runs, 1):
        ended, folder = ended_before(config), RunFolder(config.run_dir)
        logger.info("sweep %d/%d: %s%s", number, len(runs), folder.path, ended and f": {ended}, not repeated")
        if ended:
            continue
        codes[config.run.name] = code = child.run([*words, *options])
        status = None if dry or code else folder.read_status()
        if child.is_stopped or (status is not None and status.state is State.STOPPED):
            logger.info("the sweep has stopped at run %d of %d: the same command resumes", number, len(runs))
            break
    if not dry:
        from observe.runs import print_table

        print_table([RunFolder(config.run_dir) for _, config in runs if config.run_dir.is_dir()])
    if failed := [name for name, code in codes.items() if code not in (0, EXIT_DIVERGED)]:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed (see above): {', '.join(failed)}; the same command retries"
        )
    if len(codes) == len(runs) and all(codes.values()):
        raise Diverged("every run of the sweep diverged: try lower values of optimizer.lr")


def variants(sweeps: Sequence[str]) -> list[list[str]]:
    """The changes of each run: one value of each sweep, in every combination. Raises UserError."""
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, listed = text.partition("=")
        values = split_values(listed)
        if not equals or not all(values) or len(set(values)) < len(values) or key in axes or key == "run.name":
            raise UserError(
                f"invalid --sweep {text!r}: expected KEY=V1,V2,... with values that differ, each key once; a run's name has "
                "its values, so run.name itself is none"
            )
        axes[key] = [f"{key}={value}" for value in values]
    return [list(changes) for changes in itertools.product(*axes.values())]


def split_values(text: str) -> list[str]:
    """At its commas, but for those inside brackets and double quotes: [0.9,0.95],[0.9,0.99] are two values."""
    return [part.strip().strip('"') for part in SEPARATOR.split(text)]


def named(arguments: list[str], changes: list[str]) -> tuple[list[str], Config]:
    """The arguments of one run, and its config."""
    words = [*arguments, *changes]
    words.append(f"run.name={name_with(config_from_arguments(words).run.name, changes)}")
    return words, config_from_arguments(words)


def name_with(name: str, changes: Sequence[str]) -> str:
    """A run's name with its changes: optimizer.lr=1e-3 of `a` is a-lr-1e-3."""
    parts = (change.partition("=") for change in changes if not change.startswith("run.name="))
    # What no name may have, such as the brackets of a list, becomes a dash.
    words = (re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]}={value}").strip("-") for key, _, value in parts)
    return "-".join((name, *words))


def ended_before(config: Config) -> str:
    """How a run with this config ended that would not do otherwise if it were started again; empty for others."""
    folder = RunFolder(config.run_dir)
    status = folder.read_status()
    if status is None or not folder.config.is_file() or folder.config.read_text(encoding="utf-8") != to_toml(config):
        return ""
    return "diverged" if status.exit_code == EXIT_DIVERGED else "done" if status.state is State.DONE else ""


class Child:
    """The run at hand. Signals are passed on to it, in a group where a terminal's Ctrl-C does not reach it twice: as
    always, it saves and exits, and a second one ends it now.
    """

    def __init__(self) -> None:
        self.is_stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: object) -> None:
        self.is_stopped = True
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, words: list[str]) -> int:
        """The exit code of `pipeline train WORDS`. Its result, on stdout, is in the table too."""
        # This very package, whatever the working folder has (-P).
        command = [sys.executable, "-P", "-m", "pipeline", "train", *words]
        path = os.pathsep.join(filter(None, (str(pipeline.HOME), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, process_group=0)
        return self._process.wait()
