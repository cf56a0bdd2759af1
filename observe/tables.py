"""Values as text and tables on stdout, shared by all commands that look at files.

What comes out of files is shown with its control characters escaped and never as markup, so that no
text can reach the terminal as a command.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.log import printable

FILE_WIDTH = 120  # of tables in a file or a pipe
LISTED = 3


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, default=str) + "\n")


def open_console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)


def plain_table(*titles: str) -> Table:
    """Columns without lines around them; without titles, the rows alone."""
    return Table(*titles, show_header=bool(titles), box=None, pad_edge=False)


def cell(value: Any) -> Text:
    return Text(printable(format_value(value)))


def format_value(value: Any) -> str:
    """A value of JSON on one line: numbers with commas, of a long list the first entries."""
    match value:
        case dict():
            return ", ".join(f"{name} {format_value(entry)}" for name, entry in value.items())
        case list():
            return format_list([format_value(entry) for entry in value])
        case bool() | None:
            return str(value).lower()
        case float():
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
    return str(value)


def format_list(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - LISTED:,} more" if len(entries) > LISTED else ""
    return "; ".join(entries[:LISTED]) + more


def format_count(count: float) -> str:
    """Three digits of a large count, and its unit: 12.4M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= count < 1e15:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}" if count < 1e3 else f"{count:.3g}"
