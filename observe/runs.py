"""Every run below a folder, from its small files alone: what it is doing, how good it is, and how its config differs."""

import difflib
import fnmatch
import json
import math
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from observe.tables import format_count, print_json
from pipeline.config.keys import KEYS
from pipeline.config.other_names import keys_for
from pipeline.errors import UserError
from pipeline.log import logger, printable
from pipeline.machine.terminal import format_duration, format_number
from pipeline.runs import LAST_BYTES, RunFolder, State, all_runs

Entry = dict[str, Any]  # of a run: what --json prints
# Titles and formats. The last columns are the first to go where a terminal is narrow, down to the time left.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "name": ("name", str), "state": ("state", str), "age_s": ("age", format_duration), "step": ("step", "{:,}".format),
    "loss": ("loss", format_number), "tokens_per_s": ("tokens/s", format_count), "eta_s": ("left", format_duration),
    "best_val_loss": ("best val", format_number), "lr": ("lr", format_number),
    "parameters": ("parameters", format_count), "hours": ("hours", "{:,.3g}".format), "tokens": ("tokens", format_count),
    "dataset": ("dataset", str),
}  # fmt: skip
LEAST_COLUMNS, LEAST_NAME = 7, 6
# They differ between any two runs and say nothing about them.
NO_DIFFERENCES = ("run.name", "run.dir")


def run(folder: Path | None, where: Sequence[str], sort: str, as_json: bool) -> None:
    """Print the runs below `folder`, by default runs/, for which every KEY=VALUE of `where` holds. Raises
    UserError for an unknown key.
    """
    root = folder or Path("runs")
    if folder is not None and not root.is_dir():
        raise UserError(f"no folder {root}: expected one with runs in it")
    entries = [entry_of(found, root) for found in all_runs(root)]
    if not entries:
        logger.info("no run under %s", root)
    for condition in where:
        name, equals, wanted = condition.partition("=")
        if not equals:
            raise UserError(f"invalid --where {condition!r}: expected KEY=VALUE, such as optimizer.lr=3e-4")
        check_key(name.strip(), entries)
        entries = [entry for entry in entries if matches(value_of(entry, name.strip()), wanted.strip())]
    write(entries, sort, as_json)


def print_table(folders: Iterable[RunFolder]) -> None:
    """Of some runs, the best one first."""
    write([entry_of(folder, folder.path.parent) for folder in folders], "best_val_loss", as_json=False)


def entry_of(folder: RunFolder, root: Path) -> Entry:
    """What is missing or damaged is null."""
    summary = folder.summary(LAST_BYTES)
    with suppress(ValueError):  # a link may lead elsewhere
        name = str(folder.path.relative_to(root))
    config = folder.read_config()
    mixture = config.get("data.mixture") or [{"dataset": config.get("data.dataset")}]
    hours = None if summary.trained_s is None else summary.trained_s / 3600
    dataset = " + ".join(str(entry.get("dataset")) for entry in mixture) if config else None
    return summary.as_json() | {"name": name, "dataset": dataset, "hours": hours, "config": config}


def check_key(name: str, entries: Sequence[Entry]) -> None:
    """Raises UserError unless it is a column, or a config key, if only of an earlier version."""
    known = {*COLUMNS, *KEYS, *(key for entry in entries for key in (*entry, *entry["config"]))}
    if name not in known:
        near = keys_for(name) or difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(f"unknown key {name}{hint}: expected a config key or one of {', '.join(COLUMNS)}")


def value_of(entry: Entry, name: str) -> Any:
    return entry["config"][name] if name in entry["config"] else entry.get(name)


def matches(value: Any, wanted: str) -> bool:
    """Numbers, lists and truth as values: 3e-4 is 0.0003; text as a pattern with * and ?."""
    if isinstance(value, str):
        return fnmatch.fnmatchcase(value, wanted.strip("\"'"))
    with suppress(tomllib.TOMLDecodeError):
        return bool(value == tomllib.loads(f"value = {wanted}")["value"])
    return False


def write(entries: list[Entry], sort: str, as_json: bool) -> None:
    """Sorted by a key, with `-` before it from the largest; what has none comes last."""
    key = sort.removeprefix("-")
    check_key(key, entries)
    known = [entry for entry in entries if value_of(entry, key) is not None]
    numbers = all(isinstance(value_of(entry, key), int | float) for entry in known)
    known.sort(key=lambda entry: value_of(entry, key) if numbers else str(value_of(entry, key)), reverse=sort != key)
    entries = known + [entry for entry in entries if value_of(entry, key) is None]
    mark_differences(entries)
    if as_json:
        return print_json(entries)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    for line, entry in zip(format_entries(entries, width), ({}, *entries), strict=True) if entries else ():
        sys.stdout.write(f"{line}\n")
        if differs := "  ".join(f"{key}={short(value)}" for key, value in entry.get("differs", {}).items()):
            sys.stdout.write(f"    {printable(differs)}\n")
    return None


def mark_differences(entries: list[Entry]) -> None:
    """`differs`: for each run the values of its config that more than half of the runs do not have."""
    for entry in entries:
        entry["differs"] = {}
    for key in dict.fromkeys(key for entry in entries for key in entry["config"] if key not in NO_DIFFERENCES):
        # As text, since a list cannot be counted; a run of an earlier version has no such key.
        texts = [json.dumps(entry["config"].get(key), default=str) for entry in entries if entry["config"]]
        usual, count = Counter(texts).most_common(1)[0]
        for entry in entries:
            value = entry["config"].get(key)
            if value is not None and not (json.dumps(value, default=str) == usual and 2 * count > len(texts)):
                entry["differs"][key] = value


def format_entries(entries: Sequence[Entry], width: float) -> list[str]:
    """A heading, and a line for each run, of the columns that fit into `width`."""
    rows = [[title for title, _ in COLUMNS.values()]]
    for entry in entries:
        # A run that is alive was updated a moment ago.
        known = entry | ({"age_s": None} if entry["state"] == State.RUNNING else {})
        values = [(known.get(name), form) for name, (_, form) in COLUMNS.items()]
        rows.append(["-" if value is None else printable(form(value)) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > width and len(widths) > LEAST_COLUMNS:
        widths.pop()
    if (excess := sum(widths) + 2 * len(widths) - 2 - width) > 0:  # then a long name loses its end
        widths[0] = max(LEAST_NAME, widths[0] - int(excess))
    sides = ["<" if form is str else ">" for _, form in COLUMNS.values()]
    return [
        "  ".join(f"{text[:size]:{side}{size}}" for text, side, size in zip(row, sides, widths, strict=False)).rstrip()
        for row in rows
    ]


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
