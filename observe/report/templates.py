"""The files that a page is made of, and Jinja over them: all that comes from a run is escaped."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment

from observe.tables import format_value
from pipeline.files import finite
from pipeline.log import LAYOUT, printable

MOST_CHARACTERS = 2000  # of a text


def resource(name: str) -> str:
    return files("observe.report").joinpath(name).read_text(encoding="utf-8")


def fill(name: str, **content: Any) -> str:
    """A template with its content."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": shown, "number": number, "value": lambda value: shown(format_value(value))}
    return environment.from_string(resource(name)).render(content)


def shown(text: Any) -> str:
    """Text of a run, limited, with control characters and those that turn its direction escaped."""
    text = str(text)
    more = f" … and {len(text) - MOST_CHARACTERS:,} more characters" if len(text) > MOST_CHARACTERS else ""
    return printable(text[:MOST_CHARACTERS], keep=LAYOUT) + more


def number(value: Any, digits: int = 0) -> str:
    """With commas; empty for what is unknown."""
    known = finite(value)
    return "" if known is None else f"{known:,.{digits}f}"
