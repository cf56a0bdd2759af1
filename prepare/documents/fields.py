"""The text field of a row, which may lie inside other fields: `meta.content`."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from prepare.units import MISSING, NULL, Document, Refused, encoded

NOT_AN_OBJECT = "not an object"
NOT_TEXT = "not text"
NAMES_LISTED = 20
# A row is held complete, as bytes, as characters and as values.
MOST_ROW_BYTES = 256 << 20
TOO_LONG = Refused("too long", broken=True, detail=f"a row has at most {MOST_ROW_BYTES >> 20} MB: use a .txt file")


def text_of(row: Any, text_field: str) -> Document:
    """The text of a row that was parsed: an object's field, or a string itself."""
    if isinstance(row, dict):
        try:
            text = _find(row, text_field)
        except KeyError:
            return Refused(MISSING, detail=f"its fields are: {listed(row)}")
        wrong = Refused(NOT_TEXT, broken=True, detail=f"the field {text_field!r} holds {type(text).__name__}")
    else:
        text = row
        wrong = Refused(NOT_AN_OBJECT, broken=True, detail=f"expected an object, got {type(row).__name__}")
    if isinstance(text, str):
        return encoded(text)
    return Refused(NULL) if text is None else wrong


def _find(row: Mapping[str, Any], text_field: str) -> Any:
    if text_field in row:  # also a field that is literally called `meta.content`
        return row[text_field]
    name, _, rest = text_field.partition(".")
    inner = row[name]
    if isinstance(inner, dict):
        return _find(inner, rest)
    if inner is None:  # an object that is null has no text, as a text that is null
        return None
    raise KeyError(text_field)


def listed(row: Mapping[str, Any]) -> str:
    """The names of the fields, for an error."""
    names = list(islice(_names(row), NAMES_LISTED + 1))
    return ", ".join(names[:NAMES_LISTED] + ["..."] * (len(names) > NAMES_LISTED)) or "none"


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        inner = _names(value) if isinstance(value, dict) and value else ()
        yield from (f"{name}.{each}" for each in inner) if inner else (name,)
