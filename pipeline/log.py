"""Log lines and progress, all on stderr.

On a terminal long work shows a bar. Into a file it writes a plain line every `LINE_INTERVAL_S`,
because people follow SLURM logs, and never a control character. Only rank 0 logs everything; the
others log warnings and errors.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from pipeline import launch

LINE_INTERVAL_S = 10.0
LAYOUT = "\n\t\u00a0\u3000"  # whitespace that no terminal interprets as a command

logger = logging.getLogger("pipeline")
console = Console(stderr=True, highlight=False)


class _ConsoleHandler(logging.Handler):
    """Prints through the console that draws the bar, so that a log line does not break it."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, soft_wrap=True)


def configure() -> None:
    """Send the log to stderr; ranks other than 0 log warnings only, with their number."""
    handler = _ConsoleHandler() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    rank = launch.rank()
    # torchrun prints all ranks into one stream, so a line without a number is rank 0's.
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if rank else "%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False  # or a library that configures the root logger would print every line again


@contextmanager
def also_to_file(path: Path) -> Iterator[None]:
    """Append every log line to `path` as well, with a timestamp."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def printable(text: str, keep: str = "") -> str:
    """`text` with its control characters escaped, except those in `keep`: the content of a file may
    hold terminal escape sequences.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class ProgressReport:
    """Progress of a long operation: `with ProgressReport("encode", total=n, unit="MB") as report:
    report.advance(1)`.

    `total`, `done` (by an earlier start) and the amounts are in `unit`; a total of None (a stream)
    shows amounts without a percentage.
    """

    def __init__(self, title: str, total: float | None, unit: str, done: float = 0.0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and logger.level <= logging.INFO:
            # transient: the bar disappears at its end, and the log lines above it stay.
            columns = BarColumn(), TaskProgressColumn(), "{task.fields[note]}", TimeRemainingColumn()
            self._bar = Progress("{task.description}", *columns, console=console, transient=True, redirect_stdout=False)
            self._task = self._bar.add_task(self.title, total=self.total, completed=int(self.done), note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float, note: str = "") -> None:
        """Add `amount`; `note` is a short text shown next to the rate."""
        self.done += amount
        now = time.monotonic()
        # What an earlier start finished must not count as speed.
        rate = (self.done - self._done_before) / max(now - self._started, 1e-9)
        text = f"{self.done:,.0f} {self.unit}, {rate:,.1f} {self.unit}/s" + (f", {note}" if note else "")
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=int(self.done), note=text)
        elif now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            left = f", {max(self.total - self.done, 0) / rate:,.0f} s left" if self.total and rate else ""
            logger.info("%s: %s%s", self.title, text, left)
