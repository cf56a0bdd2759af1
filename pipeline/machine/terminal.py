"""A run on a terminal, as one panel or as a row of several, and as a line where there is no terminal.
`train` and `watch` show the same. No torch.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.log import LINE_INTERVAL_S, console, logger, printable
from pipeline.runs import RunSummary, State

# A drawing takes 5 ms on a slow core: once in two seconds that is 0.25 %, and little over a slow line.
DRAW_INTERVAL_S = 2.0
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
CURVE_WIDTH, GAP = 24, 3
KEPT_PER_ROW = 0.95  # of the smoothed loss: the last twenty rows make up two thirds of it
COLORS = {
    State.RUNNING: "green", State.DONE: "cyan", State.STOPPED: "yellow", State.FAILED: "red", State.DEAD: "red",
    State.UNKNOWN: "none",
}  # fmt: skip
LINE_FIELDS = (
    "step", "max_steps", "loss", "val_loss", "best_val_loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu",
    "data_wait", "memory_bytes", "eta_s",
)  # fmt: skip


def can_draw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose cursor moves, so that a picture can replace the one before."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


class RunDisplay:
    """What `train` shows while it trains: a panel or, where nothing can be drawn, a line every
    LINE_INTERVAL_S.
    """

    def __init__(self, summary: Callable[[], RunSummary]) -> None:
        self._summary, self._due = summary, 0.0
        is_drawn = can_draw(sys.stderr) and logger.isEnabledFor(logging.INFO)
        # Drawn by the training thread, when it says so: another one would interrupt it at any time.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False) if is_drawn else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(RunPanel(self._summary()))
            self._live.stop()

    def step_ended(self, is_last: bool) -> None:
        """Show the run if that is due."""
        if time.monotonic() < self._due and not is_last:
            return
        if self._live is not None:
            self._live.update(RunPanel(self._summary()), refresh=True)
        else:
            logger.info("%s", line(self._summary()))
        self._due = time.monotonic() + (LINE_INTERVAL_S if self._live is None else DRAW_INTERVAL_S)


class RunPanel:
    """A run in a frame; what does not fit into a line of the terminal is in the next one."""

    def __init__(self, run: RunSummary) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run, color = self.run, COLORS[self.run.state]
        first = Table.grid(padding=(0, 2), expand=True)
        first.add_column(ratio=1)
        bar = ProgressBar(total=run.max_steps or None, completed=min(run.step, run.max_steps or 0))
        first.add_row(bar, f"step {format_step(run)}", f"{format_duration(run.eta_s)} left")
        # So that the ^C which a terminal writes behind the frame does not begin a line of its own.
        lines, width = [Text()], options.max_width - 2
        for name, value in figures(run, options.ascii_only).items():
            cell = Text.assemble((f"{name} ", "dim"), value)
            if lines[-1].cell_len + GAP + cell.cell_len > width - 4:  # the frame and its padding
                lines.append(Text())
            lines[-1].append(" " * (GAP if lines[-1] else 0)).append_text(cell)
        title = Text(f"{printable(run.name)}: {format_state(run)}", style=color)
        yield Panel(Group(first, *lines), title=title, border_style=color, width=width)


def figures(run: RunSummary, ascii_only: bool) -> dict[str, str]:
    """What a panel shows below the bar, by name."""
    peak = f" of {run.peak_flops / 1e12:,.0f} TFLOP/s" if run.peak_flops else ""
    return {
        "loss": f"{format_number(run.loss)} {sparkline(run.losses, CURVE_WIDTH, ascii_only)}",
        "smoothed": format_number(smoothed(run.losses)),
        "rate": "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f} tokens/s",
        "val": format_number(run.val_loss),
        "best": format_number(run.best_val_loss),
        "lr": format_number(run.lr),
        "gradient norm": format_number(run.grad_norm),
        "MFU": f"{_percent(run.mfu)}{peak}",
        "data wait": _percent(run.data_wait),
        "memory": "-" if run.memory_bytes is None else f"{run.memory_bytes / 1e9:.2f} GB",
        "tokens": format_number(run.tokens),
        **{name: format_number(value) for name, value in run.scores.items()},
    }


def line(run: RunSummary) -> str:
    """`key=value` of what is known, with the keys of metrics.jsonl and status.json."""
    known = ((name, getattr(run, name)) for name in LINE_FIELDS)
    return " ".join(f"{name}={_plain(value)}" for name, value in known if value is not None)


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """`values` in at most `width` columns, each the mean of an equal part of them."""
    bars, width = ASCII_BARS if ascii_only else BARS, min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)


def smoothed(values: Iterable[float]) -> float | None:
    """The exponential moving average, corrected for its start at 0 (Kingma and Ba 2015)."""
    average = weight = 0.0
    for value in values:
        average = KEPT_PER_ROW * average + (1 - KEPT_PER_ROW) * value
        weight = KEPT_PER_ROW * weight + 1 - KEPT_PER_ROW
    return average / weight if weight else None


def format_state(run: RunSummary) -> str:
    """With the time since its last sign of life, where it is dead."""
    return f"dead {format_duration(run.age_s)} ago" if run.state is State.DEAD else run.state


def format_step(run: RunSummary) -> str:
    return f"{run.step:,}" + (f" / {run.max_steps:,}" if run.max_steps else "")


def format_duration(seconds: float | None) -> str:
    """As h:mm:ss or, from a day on, as days and hours."""
    if seconds is None:
        return "-"
    whole = timedelta(seconds=round(max(seconds, 0.0)))
    return f"{whole.days}d {whole.seconds // 3600}h" if whole.days else str(whole)


def format_number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.2e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _plain(value: float) -> str:
    """Without commas, which a reader of `key=value` would have to remove."""
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:.5g}"
