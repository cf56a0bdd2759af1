"""Reading text in units of work: a unit knows its place in a corpus and yields the documents there.

Units can be pickled, so worker processes read what they encode and the parent only plans. Text stays UTF-8 bytes: a str
of mostly ASCII with one emoji takes four times the room.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from pipeline.errors import UserError

# About what one unit holds in text, between these: small enough that a kill loses seconds and the workers come to the
# end together, large enough that handing over a unit and syncing what it gave (some 20 ms) do not count.
SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 16 << 20
UNITS_IN_A_CORPUS = 64
# Longer documents are read block by block, so that memory does not follow the longest one.
LONG_BYTES = 4 << 20
BLOCK_BYTES = 1 << 20
STDIN_SPOOL = "stdin.partial"
# Why a document is left out.
NOT_UTF8 = "not UTF-8"
NULL = "null"


@dataclass(frozen=True)
class Refused:
    """A document that is left out, counted and reported, such as one that is not UTF-8."""

    reason: str


class LongDocument(Protocol):
    """A document above `LONG_BYTES`."""

    def blocks(self) -> Iterator[bytes]:
        """Its UTF-8 text from the beginning, each time it is asked, in blocks cut anywhere."""
        ...


Document = bytes | LongDocument | Refused


class Unit(Protocol):
    @property
    def size(self) -> int:
        """Bytes of text, as near as they are known before reading."""
        ...

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Each document and its position, of which `place` makes words. Bytes are valid UTF-8, and may be empty."""
        ...

    def place(self, position: int) -> str:
        """Where a document lies, for people: a file and what leads to the place in it."""
        ...


class Item(Protocol):
    """A piece of a corpus that is planned before any text is read: one unit, or a stream that has to be read in order."""

    @property
    def size(self) -> int:
        """Bytes of text, as near as they are known before reading: for progress, and to share the work."""
        ...

    def units(self) -> Iterator[Unit]:
        """The same units in the same order every time."""
        ...


def unit_bytes(corpus_bytes: int) -> int:
    """How much text a unit of this corpus holds: the same for any number of workers."""
    return min(max(corpus_bytes // UNITS_IN_A_CORPUS, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


class OneUnit:
    """An item that is its only unit."""

    def units(self: Any) -> Iterator[Any]:
        yield self


@dataclass(frozen=True)
class TextFiles(OneUnit):
    """Whole files, each one document."""

    paths: tuple[str, ...]
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        for number, path in enumerate(self.paths):
            yield number, utf8(_read_bytes(path))

    def place(self, position: int) -> str:
        return self.paths[position]


@dataclass(frozen=True)
class Texts(OneUnit):
    """Documents that were already read, from `first` on of what `what` names."""

    texts: tuple[Document, ...]
    size: int
    what: str
    first: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        yield from enumerate(self.texts, start=self.first)

    def place(self, position: int) -> str:
        return f"{self.what} row {position}"


@dataclass(frozen=True)
class Lines(OneUnit):
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

    def documents(self) -> Iterator[tuple[int, Document]]:
        for begin, line in self._lines():
            if self.text_field is None:
                yield begin, utf8(line.removesuffix(b"\r"))
            elif line.strip():
                yield begin, self._from_json(begin, line)

    def place(self, position: int) -> str:
        return f"{self.shown} at byte {position}"

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

    def _from_json(self, begin: int, line: bytes) -> Document:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if isinstance(utf8(line), Refused):
                return Refused(NOT_UTF8)
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
        return Refused(NULL) if text is None else text.encode()

    def _place(self, begin: int) -> str:
        return f"{self.shown} line {self._number(begin)}"

    def _number(self, begin: int) -> int:
        """Counted only when an error needs it: units know bytes, people know lines."""
        with Path(self.path).open("rb") as file:
            blocks = (file.read(min(BLOCK_BYTES, begin - at)) for at in range(0, begin, BLOCK_BYTES))
            return 1 + sum(block.count(b"\n") for block in blocks)


def plan_lines(path: Path, text_field: str | None, unit_bytes: int) -> Iterator[Lines]:
    end = path.stat().st_size
    for start in range(0, end, unit_bytes):
        yield Lines(str(path), start, min(start + unit_bytes, end), text_field)


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def utf8(content: bytes) -> Document:
    try:
        content.decode()
    except UnicodeDecodeError:
        return Refused(NOT_UTF8)
    return content


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
