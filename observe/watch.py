"""`pipeline watch`: one or several runs, live, from metrics.jsonl and status.json alone. Any machine that
sees their folders may do it, and a run notices nothing.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from observe.runs import entry_of, format_entries
from observe.tables import open_console, print_json
from pipeline.config.keys import RunConfig
from pipeline.errors import UserError
from pipeline.machine import terminal
from pipeline.runs import RunFolder, State, all_runs, find_runs

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
    console = open_console()
    if as_json:
        print_json([folder.summary().as_json() for folder in folders])
    elif once or not terminal.can_draw(sys.stdout):
        console.print(picture(folders, console.width))
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
                live.update(picture(folders, console.width), refresh=True)
                drawn = seen
            if all(summary.state in ENDED for summary in summaries):
                return
            time.sleep(LOOK_INTERVAL_S)


def picture(folders: Sequence[RunFolder], width: int) -> RenderableType:
    """One run as a panel, several as the rows that `pipeline runs` has."""
    if len(folders) == 1:
        return terminal.RunPanel(folders[0].summary())
    entries = [entry_of(folder, folder.path.parent) for folder in folders]
    heading, *rows = format_entries(entries, width)
    colors = [terminal.COLORS[entry["state"] or State.UNKNOWN] for entry in entries]
    return Text("\n").join([Text(heading), *(Text(row, style=color) for row, color in zip(rows, colors, strict=True))])
