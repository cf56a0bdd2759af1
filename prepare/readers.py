"""Reading text in small units of work: a unit knows its place in a file and yields the documents there.

A unit is about 1 MB of text and can be pickled, so worker processes read what they encode and the parent only plans.
A document is a str; None stands for a table's null.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from pipeline.errors import UserError

# Large enough that the cost of handing a unit to a process (about 1 ms) is lost in encoding it (about 70 ms), small
# enough that the workers come to the end together: 100 MB by two workers took 2 % longer with 4 MB.
UNIT_BYTES = 1 << 20
# A column of equal rows shrinks to nothing in Parquet's dictionary; this bounds what one unit can unfold to.
UNIT_ROWS = 8192
STDIN_SPOOL = "stdin.partial"


class Unit(Protocol):
    @property
    def size(self) -> int:
        """Bytes of text, as near as they are known before reading."""
        ...

    def documents(self) -> Iterator[str | None]: ...


@dataclass(frozen=True)
class TextFiles:
    """Whole files, each one document."""

    paths: tuple[str, ...]
    size: int

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            yield _decode(_read_bytes(path), path)


@dataclass(frozen=True)
class Texts:
    """Documents that were already read."""

    texts: tuple[str | None, ...]
    size: int

    def documents(self) -> Iterator[str | None]:
        yield from self.texts


@dataclass(frozen=True)
class Lines:
    """The lines of a file that begin in bytes [start, stop), so that neighbours share no line and leave none out.

    With a text field a line is a JSON object (JSONL; blank lines are no documents), without one it is the document.
    """

    path: str
    start: int
    stop: int
    text_field: str | None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[str | None]:
        for begin, line in self._lines():
            if self.text_field is None:
                yield _decode(line.removesuffix(b"\r"), self.shown, begin)
            elif line.strip():
                yield self._from_json(begin, line)

    @property
    def shown(self) -> str:
        return "stdin" if Path(self.path).name == STDIN_SPOOL else self.path

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with Path(self.path).open("rb") as file:
                begin = self.start
                if begin:
                    # From the byte before: where that is a line's end, the line at `start` is ours.
                    file.seek(begin - 1)
                    begin += len(file.readline()) - 1
                content = file.read(max(self.stop - begin, 0))
                if content and not content.endswith(b"\n"):
                    content += file.readline()
        except OSError as error:
            raise UserError(f"cannot read {self.shown}: {error.strerror}") from None
        for line in content.removesuffix(b"\n").split(b"\n") if content else ():
            yield begin, line
            begin += len(line) + 1

    def _from_json(self, begin: int, line: bytes) -> str | None:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            _decode(line, f"{self.shown} line {self._number(begin)}", begin)
            raise UserError(
                f"{self._place(begin)} is not JSON ({error}): wanted one object a line, "
                f'such as {{"{self.text_field}": "..."}}'
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{self._place(begin)} is not a JSON object but {_shorten(line)}: wanted one object a line")
        if self.text_field not in row:
            raise UserError(no_field(self._place(begin), str(self.text_field), row))
        text = row[self.text_field]
        if text is not None and not isinstance(text, str):
            raise UserError(no_text(self._place(begin), str(self.text_field), text))
        return text

    def _place(self, begin: int) -> str:
        return f"{self.shown} line {self._number(begin)}"

    def _number(self, begin: int) -> int:
        """Counted only when an error needs it: units know bytes, people know lines."""
        with Path(self.path).open("rb") as file:
            blocks = (file.read(min(UNIT_BYTES, begin - at)) for at in range(0, begin, UNIT_BYTES))
            return 1 + sum(block.count(b"\n") for block in blocks)


def plan_lines(path: Path, text_field: str | None) -> Iterator[Lines]:
    end = path.stat().st_size
    for start in range(0, end, UNIT_BYTES):
        yield Lines(str(path), start, min(start + UNIT_BYTES, end), text_field)


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decode(content: bytes, path: str, offset: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at byte offset {offset + error.start} "
            f"({error.reason}); convert it to UTF-8, for example with iconv"
        ) from None


def _shorten(content: bytes) -> str:
    text = content.decode().strip()
    return text if len(text) <= 40 else text[:40] + "..."


def no_field(place: str, text_field: str, row: Iterable[str]) -> str:
    there = ", ".join(row) or "none"
    return f"{place} has no field {text_field!r}; the fields there are: {there}; choose one with --text-field"


def no_text(place: str, text_field: str, value: Any) -> str:
    return (
        f"{place}: the field {text_field!r} holds {type(value).__name__}, wanted text; choose another with --text-field"
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
