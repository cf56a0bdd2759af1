"""What a run is doing now: status.json, and how fast it trains."""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch

from pipeline.dataset.mixture import Mixture
from pipeline.errors import code_of, reason_of
from pipeline.log import logger
from pipeline.machine.cores import CoreWatch
from pipeline.runs import Row, RunFolder, RunSummary, State, Status, summarize
from train.metrics.record import bits_per_byte

# Readers take a run for dead when status.json is much older than 15 s.
STATUS_INTERVAL_S = 10.0
SHOWN_ROWS = 240  # as a curve on a terminal: ten to each of its columns


class LiveStatus:
    """What rank 0 reports about a run, from its first moment to its end. Other ranks only `update`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        # Times, and the last losses, hold until this start has measured its own.
        before = folder.read_status() or Status(State.RUNNING, 0)
        self.now = replace(before, state=State.RUNNING, reason="", exit_code=None, updated_at="")
        self.rows: deque[Row] = deque(maxlen=SHOWN_ROWS)
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

    def step_ended(self, step: int, last_step: int, step_s: float, left_s: float) -> None:
        """`eta_s` is by the wall clock of this start, with its evaluations and saves; at most `left_s`."""
        if not self._began:
            self._first_step, self._began = step - 1, time.monotonic() - step_s
            self.update(first_step_s=step_s)
        per_step_s = (time.monotonic() - self._began) / (step - self._first_step)
        self.update(step=step, step_s=step_s, eta_s=min(per_step_s * (last_step - step), left_s))

    def resumed(self, **values: Any) -> None:
        """Take the val losses and the last rows from metrics.jsonl, which ends where this start begins."""
        losses = self.folder.val_losses()
        last = losses[-1] if losses else None
        self.rows.extend(self.folder.rows(self.folder.metrics))
        self.update(val_loss=last, best_val_loss=min(losses, default=None), **values)

    def evaluated(self, val_loss: float, mixture: Mixture, eval_s: float) -> None:
        best = val_loss if self.now.best_val_loss is None else min(self.now.best_val_loss, val_loss)
        bits = bits_per_byte(val_loss, mixture)
        self.update(val_loss=val_loss, best_val_loss=best, bits_per_byte=bits, eval_s=eval_s)

    def summary(self) -> RunSummary:
        return summarize(self.folder.path, self.now, self.rows)

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
        self._cores = CoreWatch()

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
        # Not by a run on the CPU of a machine with a GPU.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
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
        self._cores.look()
        return row


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: on a GPU what torch allocated there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
