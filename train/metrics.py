"""What a run records about itself: metrics.jsonl, bad_steps.jsonl, status.json and TensorBoard."""

import json
import math
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch

from pipeline.dataset.mixture import Mixture
from pipeline.errors import code_of, reason_of
from pipeline.log import logger
from pipeline.runs import RunFolder, State, Status
from train.evaluation import ValLoss

Row = dict[str, Any]
# Readers take a run for dead when status.json is much older than 15 s.
STATUS_INTERVAL_S = 10.0


class Metrics:
    """Records nothing: what every rank has but the first, which has `FileMetrics`."""

    def write(self, row: Row) -> None:
        """Append a row; it has a `step`, and every other number becomes a TensorBoard scalar. NaN
        and inf become null.
        """

    def write_bad_step(self, row: Row) -> None:
        """Append to bad_steps.jsonl the samples of a step that did not reach the weights."""

    def write_event(self, event: str, step: int, **details: str) -> None:
        """Append to events.jsonl, with the time."""

    def write_text(self, name: str, text: str, step: int) -> None:
        """Show `text` in TensorBoard as it is."""

    def close(self) -> None:
        """Close the files."""


class FileMetrics(Metrics):
    """Rows and curves in the run's folder, which has none past `first_step`."""

    def __init__(self, folder: RunFolder, first_step: int, tensorboard: bool) -> None:
        self._folder = folder
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._tensorboard = _summary_writer(folder, first_step) if tensorboard else None

    def write(self, row: Row) -> None:
        # json would write NaN, which is not JSON.
        row = {name: value if math.isfinite(value or 0) else None for name, value in row.items()}
        with _writing(self._folder.metrics):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._tensorboard is None:
            return
        with _writing(self._folder.tensorboard):
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()  # or a kill would lose up to two minutes of rows that metrics.jsonl has

    def write_bad_step(self, row: Row) -> None:
        with self._folder.bad_steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_event(self, event: str, step: int, **details: str) -> None:
        row = {"step": step, "event": event, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._folder.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | details) + "\n")

    def write_text(self, name: str, text: str, step: int) -> None:
        if self._tensorboard is not None:
            # Indented, it is code to Markdown, which would otherwise lay it out.
            self._tensorboard.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)
            self._tensorboard.flush()

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed, or its error raised
            self._file.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()


class LiveStatus:
    """What rank 0 reports about a run, from its first moment to its end. Other ranks only `update`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        # Times, and the last losses, hold until this start has measured its own.
        self.now = replace(
            folder.read_status() or Status(State.RUNNING, 0), state=State.RUNNING, reason="", exit_code=None
        )
        self.fault: OSError | None = None
        self._first_step, self._began = 0, 0.0
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        """Write it now and every STATUS_INTERVAL_S."""
        self.write()
        threading.Thread(target=self._repeat, name="status", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.end(State.FAILED, reason_of(error), code_of(error))

    def update(self, **values: Any) -> None:
        self.now = replace(self.now, **values)

    def step_ended(self, step: int, max_steps: int, step_s: float) -> None:
        """`eta_s` is by the wall clock of this start, with its evaluations and saves."""
        if not self._began:
            self._first_step, self._began = step - 1, time.monotonic() - step_s
            self.update(first_step_s=step_s)
        per_step_s = (time.monotonic() - self._began) / (step - self._first_step)
        self.update(step=step, step_s=step_s, eta_s=per_step_s * (max_steps - step))

    def check(self) -> None:
        """Raises the error of the thread."""
        if self.fault is not None:
            raise self.fault

    def write(self) -> None:
        with self._lock:
            if not self._ended.is_set():
                self.folder.write_status(self.now)

    def end(self, state: State, reason: str, exit_code: int) -> None:
        """The last word, which a disk that is full or gone must not turn into another error."""
        if self._ended.is_set():
            return
        self.update(state=state, reason=reason, exit_code=exit_code, eta_s=None)
        try:
            self.write()
        except OSError as error:
            logger.warning("%s could not be written: %s", self.folder.status, reason_of(error))
        self._ended.set()

    def _repeat(self) -> None:
        while not self._ended.wait(STATUS_INTERVAL_S):
            try:
                self.write()
            except OSError as error:
                self.fault = error  # the trainer raises it, on all ranks
                return


class Throughput:
    """Tokens per second of training alone, since the last row: evaluations and saves do not count."""

    def __init__(self, tokens_per_step: int, flops_per_token: int, peak_flops: float | None) -> None:
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.last_step_s = 0.0
        self._steps, self._seconds, self._lap_began = 0, 0.0, 0.0

    def start(self) -> None:
        """The first step begins."""
        self._lap_began = time.perf_counter()

    def lap(self) -> None:
        """A step's loss was read. The optimizer's kernels may still run, and are waited for in the
        next lap: so laps follow each other without a gap.
        """
        now = time.perf_counter()
        self.last_step_s, self._lap_began = now - self._lap_began, now
        self._steps += 1
        self._seconds += self.last_step_s

    @property
    def step_s(self) -> float:
        """Seconds that a step takes: the last one or, if that has taken longer by now, this one."""
        return max(self.last_step_s, time.perf_counter() - self._lap_began)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued still is
        began = time.perf_counter()
        yield
        self._lap_began += time.perf_counter() - began

    @property
    def tokens_per_s(self) -> float:
        return self._steps * self.tokens_per_step / max(self._seconds, 1e-9)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (Chowdhery et al. 2022), 0 to 1 of the peak of all ranks; None
        where that is unknown.
        """
        return self.tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None

    def columns(self, waited_s: float) -> Row:
        """The speeds of a row, and the part of the time spent waiting for data; then start over."""
        data_wait = waited_s / max(self._seconds, 1e-9)
        row = {"tokens_per_s": self.tokens_per_s, "mfu": self.mfu, "data_wait": data_wait}
        self._steps, self._seconds = 0, 0.0
        return row


def val_columns(val_loss: ValLoss, mixture: Mixture, samples: int) -> Row:
    """The loss on the val split and, in a mixture, each source's loss and what the first `samples`
    samples took of it.
    """
    row: Row = {"val_loss": val_loss.mean}
    if len(mixture.sources) > 1:
        for (name, (tokens, epochs)), loss in zip(mixture.progress(samples).items(), val_loss.by_source, strict=True):
            row |= {f"val_loss_{name}": loss, f"tokens_{name}": tokens, f"epochs_{name}": epochs}
    return row


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Adds the path to an OSError, of which a file that is open already says nothing."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _summary_writer(folder: RunFolder, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        how = "pip install tensorboard, or set log.tensorboard=false"
        logger.warning("tensorboard is not installed, so %s stays empty: %s", folder.tensorboard, how)
        return None
    _wait_for_new_name(folder)
    threading.excepthook = _without_disk_errors
    # purge_step: TensorBoard hides what an earlier start wrote past the resumed step.
    return SummaryWriter(folder.tensorboard, purge_step=first_step + 1)


def _without_disk_errors(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread prints the traceback of an error that our next flush raises too."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _wait_for_new_name(folder: RunFolder) -> None:
    """Until a new event file's name sorts after the earlier ones: at most a second.

    TensorBoard reads a folder's files in the order of their names, which begin with the second of
    their creation. Of two of the same second the process numbers would decide, and the older file
    could hide the newer one's steps.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.tensorboard.glob("events.out.tfevents.*")]
    # A clock that was set back is not waited for.
    if int(time.time()) in seconds:
        time.sleep(1 - time.time() % 1)
