"""Reading text in units of work: a unit knows its place in a corpus and yields the documents there.

Units can be pickled, so worker processes read what they encode and the parent only plans. Text stays UTF-8 bytes: a str
of mostly ASCII with one emoji takes four times the room.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

# About what one unit holds in text, between these: small enough that a kill loses seconds and the workers come to the
# end together, large enough that handing over a unit and syncing what it gave (some 20 ms) do not count.
SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 16 << 20
UNITS_IN_A_CORPUS = 64
# Longer documents are read block by block, so that memory does not follow the longest one.
LONG_BYTES = 4 << 20
BLOCK_BYTES = 1 << 20
STDIN_SPOOL = "stdin.partial"
# The folder, below a dataset's, for what can be read only once and is too long to hold; it goes when the work is done.
SPOOL_FOLDER = "unfinished/spool"
# Places inside an item, which are bytes of a file or rows, lie below 2**48.
POSITION_BITS = 48
# Why a document is left out.
NOT_UTF8 = "not UTF-8"
NULL = "null"
LONE_SURROGATE = "lone surrogate"


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

    def place(self, position: int) -> str:
        """As its units' `place`."""
        ...


def unit_bytes(corpus_bytes: int) -> int:
    """How much text a unit of this corpus holds: the same for any number of workers."""
    return min(max(corpus_bytes // UNITS_IN_A_CORPUS, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


class OneUnit:
    """An item that is its only unit."""

    def units(self: Any) -> Iterator[Any]:
        yield self


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
class Batch(OneUnit):
    """Small items that make one unit together: a hundred thousand small files are not as many units."""

    items: tuple[Item, ...]
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        for number, item in enumerate(self.items):
            for unit in item.units():
                for position, document in unit.documents():
                    yield number << POSITION_BITS | position, document
                release(unit)

    def place(self, position: int) -> str:
        return self.items[position >> POSITION_BITS].place(position & ((1 << POSITION_BITS) - 1))


def spool_file(folder: Path) -> Any:
    """A new file in a spool folder, open for writing: no two units share one, even of a source that is named twice."""
    folder.mkdir(parents=True, exist_ok=True)
    return NamedTemporaryFile("wb", dir=folder, suffix=".partial", delete=False)


def release(unit: Unit) -> None:
    """Give back what a unit holds on disk, once what it gave is kept or not wanted; its item can make it again."""
    spooled = getattr(unit, "spooled", None)
    if spooled is not None:
        Path(spooled).unlink(missing_ok=True)


def utf8(content: bytes) -> Document:
    try:
        content.decode()
    except UnicodeDecodeError:
        return Refused(NOT_UTF8)
    return content


def no_field(place: str, text_field: str, row: Iterable[str]) -> str:
    there = ", ".join(row) or "none"
    return f"{place} has no field {text_field!r}; the fields there are: {there}; choose one with --text-field"


def no_text(place: str, text_field: str, value: Any) -> str:
    return (
        f"{place}: the field {text_field!r} holds {type(value).__name__}, wanted text; choose another with --text-field"
    )
