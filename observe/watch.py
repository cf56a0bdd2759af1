"""`pipeline watch`: one or several runs, live, from metrics.jsonl and status.json alone. Any machine that
sees their folders may do it, and a run notices nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from observe.tables import open_console
from pipeline.config.keys import RunConfig
from pipeline.errors import UserError
from pipeline.log import printable
from pipeline.machine import terminal
from pipeline.machine.terminal import format_duration, format_number
from pipeline.runs import RunFolder, RunSummary, State, all_runs, find_runs

# Files change every ten seconds or so, and what has not changed is not drawn again: a slow line carries
# a few hundred bytes a second.
LOOK_INTERVAL_S = 2.0
# Others may be resumed: a SLURM job that is queued again stops and starts.
ENDED = (State.DONE, State.FAILED)


def run(names: Sequence[str], once: bool, as_json: bool) -> None:
    """Print the runs, and keep the picture up to date until they have ended or Ctrl-C. Where stdout is
    not a terminal, once.
    """
    folders = find_runs(names) if names else running_or_newest()
    if as_json:
        sys.stdout.write(json.dumps([folder.summary().as_json() for folder in folders]) + "\n")
    elif once or not terminal.can_draw(sys.stdout):
        console = open_console()
        console.print(picture([folder.summary() for folder in folders], console.width, console.options.ascii_only))
    else:
        with suppress(KeyboardInterrupt):  # the usual way to leave
            follow(folders)


def running_or_newest(runs: Path = Path(RunConfig.dir)) -> list[RunFolder]:
    """All runs that are running or, if none is, the one that was last."""
    known = [(folder, folder.summary()) for folder in all_runs(runs)]
    if not known:
        raise UserError(f"no run under {runs}: start one with pipeline train, or name a run's folder")
    running = [folder for folder, summary in known if summary.state is State.RUNNING]
    # ISO 8601 in UTC sorts by time.
    return running or [max(known, key=lambda pair: pair[1].updated_at)[0]]


def follow(folders: Sequence[RunFolder]) -> None:
    """Draw until all have ended, whenever something has changed: the runs, or the terminal's size."""
    console, drawn = open_console(), None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            summaries = [folder.summary() for folder in folders]
            # Of a run that lives, the age changes all the time and is not shown.
            seen = ([replace(summary, age_s=None) for summary in summaries], console.size)
            if seen != drawn:
                live.update(picture(summaries, console.width, console.options.ascii_only), refresh=True)
                drawn = seen
            if all(summary.state in ENDED for summary in summaries):
                return
            time.sleep(LOOK_INTERVAL_S)


def picture(summaries: Sequence[RunSummary], width: int, ascii_only: bool) -> RenderableType:
    return terminal.RunPanel(summaries[0]) if len(summaries) == 1 else run_table(summaries, width, ascii_only)


def run_table(runs: Sequence[RunSummary], width: int, ascii_only: bool = False) -> Table:
    """A row for each run. The narrower the terminal, the fewer columns; state, rate and time left stay."""
    columns: list[tuple[int, str, Callable[[RunSummary], str]]] = [
        (0, "state", terminal.format_state),
        (0, "step", terminal.format_step if width >= 100 else lambda run: f"{run.step:,}"),
        (0, "loss", lambda run: format_number(run.loss)),
        (110, "", lambda run: terminal.sparkline(run.losses, terminal.CURVE_WIDTH // 2, ascii_only)),
        (80, "val", lambda run: format_number(run.val_loss)),
        (80, "best", lambda run: format_number(run.best_val_loss)),
        (100, "lr", lambda run: format_number(run.lr)),
        (0, "tokens/s", lambda run: "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}"),
        (0, "left", lambda run: format_duration(run.eta_s)),
    ]
    shown = {title: [value(run) for run in runs] for needed, title, value in columns if width >= needed}
    taken = sum(2 + max(map(len, [title, *cells])) for title, cells in shown.items())
    table = Table(box=None, pad_edge=False)
    # A long name is cut short before any figure is.
    table.add_column("run", no_wrap=True, overflow="ellipsis", max_width=max(8, width - taken))
    for title in shown:
        table.add_column(title, justify="left" if title in ("state", "") else "right", no_wrap=True)
    for run, *cells in zip(runs, *shown.values(), strict=True):
        table.add_row(Text(printable(run.name)), *map(Text, cells), style=terminal.COLORS[run.state])
    return table
