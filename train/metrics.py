"""What a run records about itself: metrics.jsonl, bad_steps.jsonl, status.json and TensorBoard."""

import json
import math
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pipeline.dataset.mixture import Mixture
from pipeline.log import logger
from pipeline.runs import RunFolder, Status
from train.evaluation import ValLoss

Row = dict[str, Any]
# Readers of status.json take a run for dead when it is much older.
STATUS_INTERVAL_S = 15.0


class Metrics:
    """Records nothing: what every rank has but the first, which has `FileMetrics`."""

    def write(self, row: Row) -> None:
        """Append a row; it has a `step`, and every other number becomes a TensorBoard scalar. NaN
        and inf become null.
        """

    def write_bad_step(self, row: Row) -> None:
        """Append to bad_steps.jsonl the samples of a step that did not reach the weights."""

    def write_text(self, name: str, text: str, step: int) -> None:
        """Show `text` in TensorBoard as it is."""

    def write_status(self, status: Status) -> None:
        """Replace status.json. A time that is not known yet is kept from an earlier start of the
        run.
        """

    def keep_alive(self, status: Status) -> None:
        """`write_status`, if the last one was long ago."""

    def close(self) -> None:
        """Close the files."""


class FileMetrics(Metrics):
    """Rows and curves in the run's folder. Those past `first_step` are dropped: one curve, no step
    twice.
    """

    def __init__(self, folder: RunFolder, first_step: int, tensorboard: bool) -> None:
        folder.drop_rows_after(first_step)
        self._folder, self._written_at = folder, 0.0
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._tensorboard = _summary_writer(folder, first_step) if tensorboard else None

    def write(self, row: Row) -> None:
        # json would write NaN, which is not JSON.
        row = {name: value if math.isfinite(value or 0) else None for name, value in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()  # or a kill would lose up to two minutes of rows that metrics.jsonl has

    def write_bad_step(self, row: Row) -> None:
        with self._folder.bad_steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_text(self, name: str, text: str, step: int) -> None:
        if self._tensorboard is not None:
            # Indented, it is code to Markdown, which would otherwise lay it out.
            self._tensorboard.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)
            self._tensorboard.flush()

    def write_status(self, status: Status) -> None:
        self._written_at = time.monotonic()
        if (before := self._folder.read_status()) is not None:
            unknown = {name: value for name, value in vars(before).items() if getattr(status, name) is None}
            status = replace(status, **unknown)
        self._folder.write_status(status)

    def keep_alive(self, status: Status) -> None:
        if time.monotonic() - self._written_at >= STATUS_INTERVAL_S:
            self.write_status(status)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the optimizer's kernels are
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


def _summary_writer(folder: RunFolder, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        how = "pip install tensorboard, or set log.tensorboard=false"
        logger.warning("tensorboard is not installed, so %s stays empty: %s", folder.tensorboard, how)
        return None
    _wait_for_new_name(folder)
    # purge_step: TensorBoard hides what an earlier start wrote past the resumed step.
    return SummaryWriter(folder.tensorboard, purge_step=first_step + 1)


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
