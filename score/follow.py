"""The checkpoints of a run, each evaluated as it appears, from the run's folder alone: the run may train in another
process, job or node.

    runs/<name>/evals.jsonl   a row per checkpoint, by step (docs/formats.md)
                tb/evals/     the same curves for TensorBoard
                .evaluating/  the checkpoint at hand, as hard links: training may remove it meanwhile
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline import launch
from pipeline.checkpoint.find import RUNS
from pipeline.checkpoint.folder import (
    DESCRIPTION,
    TRAINING_STATE,
    Description,
    folder_name,
    read_description,
    verify_files,
)
from pipeline.checkpoint.pointers import checkpoint_folders, step_of
from pipeline.errors import UserError
from pipeline.files import Held, dump_json, holder, one_writer, parse_json, write_atomic
from pipeline.log import logger
from pipeline.machine import ranks
from pipeline.runs import Row, RunFolder, State, find_run, is_run
from score.options import EvalOptions, check_options
from score.run import evaluate
from score.tables import format_report

LOCK = ".evals.lock"
POLL_S = 3.0
APPEARS_S = 30.0  # a run that was started just before has no folder yet: it imports torch
SETTINGS = ("data", "split", "stride", "tasks", "limit")  # what the figures follow from
REMOVAL_S = 1.0  # after which a folder whose files are going is gone
NO_CURVES = ("n_shot", "documents")


def follow(options: EvalOptions) -> None:
    """Evaluate the checkpoints of options.follow until the run has ended and none is left, or until
    SIGTERM or Ctrl-C. The first rank decides what is next. Raises UserError.
    """
    world = ranks.start(options.device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            with world.fail_together():
                check_options(options)
                follower = Follower(options) if world.is_first else None
                if follower is not None:
                    stack.enter_context(follower.alone())
            ended = False
            while not ended:
                with world.fail_together():
                    news = follower.next() if follower is not None else None
                found, ended = world.gather(news)[0]
                if found is not None:
                    report = evaluate(found, options, world)
                    with world.fail_together():
                        if follower is not None:
                            follower.add(report)
                elif not ended:
                    time.sleep(POLL_S)
    except KeyboardInterrupt:
        logger.info("stopped: the same command evaluates the checkpoints that are missing")
        if world.size > 1:
            launch.end_process(0)  # other ranks may be in a collective, which would never end
    ranks.stop()


class Follower:
    """What the first rank knows of the run and of its rows."""

    def __init__(self, options: EvalOptions) -> None:
        self.run, self.options = await_run(options.follow), options
        # As JSON has them, to be compared with those of rows.
        self.settings = parse_json(dump_json({name: getattr(options, name) for name in SETTINGS}))
        self._seen: set[tuple[Path, int]] = set()  # with the time of its description: a step may be trained again
        self._writer: Any = None
        self._plotted = math.inf  # the step of the last row
        self._pinned = self.run.path / ".evaluating"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises UserError where another process follows the run."""
        try:
            with one_writer(self.run.path, LOCK), ExitStack() as stack:
                stack.callback(shutil.rmtree, self._pinned, ignore_errors=True)
                logger.info("following %s: a row of %s per checkpoint", self.run.path, self.run.evals.name)
                yield
        except Held:
            other = holder(self.run.path, LOCK)
            raise UserError(f"{self.run.path} is already followed by {other}: one follower per run") from None

    def next(self) -> tuple[Path | None, bool]:
        """The first checkpoint without a row, pinned and verified; and whether there will be none any more."""
        # Read before the folders, so that what the run writes before it ends is not missed.
        state = self.run.summary().state
        evaluated = {row.get("checkpoint") for row in self.rows() if row.get("settings") == self.settings}
        for folder in checkpoint_folders(self.run.checkpoints):
            try:
                version = (folder, (folder / DESCRIPTION).stat().st_mtime_ns)
                if version in self._seen:
                    continue
                self._seen.add(version)
                if _identity(read_description(folder)) not in evaluated:
                    return self._pin(folder), False
            except (UserError, OSError) as error:
                time.sleep(REMOVAL_S)
                if folder.is_dir() and isinstance(error, OSError):
                    raise
                logger.warning("%s is skipped: %s", folder, error if folder.is_dir() else "it was removed")
        if state is not State.RUNNING:
            logger.info("the run is over (%s), and its checkpoints are evaluated", state)
        return None, state is not State.RUNNING

    def _pin(self, folder: Path) -> Path:
        shutil.rmtree(self._pinned, ignore_errors=True)
        pinned = self._pinned / folder.name
        # Without two thirds of the bytes, which no model needs.
        shutil.copytree(folder, pinned, copy_function=_link, ignore=shutil.ignore_patterns(TRAINING_STATE))
        self.description = read_description(pinned)
        verify_files(pinned, self.description, without=(TRAINING_STATE,))
        return pinned

    def rows(self) -> list[Row]:
        """Those of evals.jsonl. Raises UserError where it is damaged."""
        try:
            rows = [parse_json(line) for line in self.run.evals.read_bytes().splitlines()]
            return sorted(rows, key=lambda row: int(row["step"]))
        except FileNotFoundError:
            return []
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.run.evals} is damaged ({error}): rename it to begin another") from None

    def add(self, report: dict[str, Any]) -> None:
        """Print a report, and put its row in the place of what there is of its step, and of later steps
        that the run has gone back from.
        """
        step = self.description.step
        row = {"step": step, "tokens": self.description.tokens, **curves(report)}
        row |= {"checkpoint": _identity(self.description), "settings": self.settings}
        report["ckpt"] = str(self.run.checkpoints / folder_name(step))
        newest = max(map(step_of, checkpoint_folders(self.run.checkpoints)), default=step)
        rows = [row, *(old for old in self.rows() if old["step"] != step and old["step"] <= max(step, newest))]
        write_atomic(self.run.evals, b"".join(map(_line, sorted(rows, key=lambda each: int(each["step"])))))
        if self.run.tensorboard.is_dir():  # neither log.tensorboard=false nor not installed
            self._plot(row)
        sys.stdout.write(_line(row).decode() if self.options.json else format_report(report))
        sys.stdout.flush()

    def _plot(self, row: Row) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step = row["step"]
        if step <= self._plotted:  # TensorBoard hides what other files have of this step or later
            self._writer = SummaryWriter(self.run.tensorboard / "evals", purge_step=step)
        for name, value in row.items():
            if isinstance(value, float):
                self._writer.add_scalar(name if "/" in name else f"eval/{name}", value, step)
        self._writer.flush()
        self._plotted = step


def await_run(name: str) -> RunFolder:
    """One run, waited for a little. Raises UserError."""
    deadline = time.monotonic() + APPEARS_S
    while time.monotonic() < deadline and not any(map(is_run, (RUNS / name, Path(name)))):
        logger.info("waiting up to %.0f s for the run %s to begin", APPEARS_S, name)
        time.sleep(APPEARS_S / 3)
    return find_run(name)


def curves(report: dict[str, Any]) -> Row:
    """A report's figures by one name each: of the mean, of each dataset of a mixture, of each task."""
    row = {name: report[name] for name in ("loss", "perplexity", "bits_per_byte")}
    if len(report["datasets"]) > 1:
        row |= {f"loss_{each['dataset']}": each["loss"] for each in report["datasets"]}
    for task, metrics in report.get("tasks", {}).items():
        row |= {f"{task}/{name}": value for name, value in metrics.items() if name not in NO_CURVES}
    return row


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:  # what is wrong with more than links is wrong with copies too
        shutil.copy2(source, target)


def _identity(description: Description) -> str:
    """Half of its hash: enough to tell two checkpoints of one step apart."""
    return description.hash[:16]


def _line(row: Row) -> bytes:
    return dump_json(row) + b"\n"
