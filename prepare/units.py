"""Reading text in units of work: a unit knows where it lies in a corpus and yields the documents
there.

Units can be pickled, so worker processes read what they encode and the parent only lists them. Text
stays UTF-8 bytes: a str of mostly ASCII with one emoji takes four times the memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pipeline.errors import UserError

# About what one unit holds in text, between these: small enough that a kill loses seconds and the
# workers finish together, large enough that handing over a unit and syncing its result (some 20 ms)
# do not count.
SMALLEST_UNIT_BYTES = 4 << 20
LARGEST_UNIT_BYTES = 16 << 20
UNITS_IN_A_CORPUS = 64
# Longer texts are read block by block where their format allows it, so that memory does not follow
# the longest one.
LONG_BYTES = 4 << 20
BLOCK_BYTES = 1 << 20
STDIN_SPOOL = "stdin.partial"
# Parts are kept by item and unit, so a preparation is never resumed where another version began it.
# Raise this whenever the same items would be divided into other units, or read differently.
SPLITTING = 2
# Positions inside an item, which are bytes of a file or rows, lie below 2**48: in a batch the
# item's number goes above.
POSITION_BITS = 48
MOST_IN_BATCH = 1 << 63 - POSITION_BITS  # so that the two fit int64 together
T = TypeVar("T")
# Why a document is skipped.
NOT_UTF8 = "not UTF-8"
NULL = "null"
MISSING = "missing"
LONE_SURROGATE = "lone surrogate"


@dataclass(frozen=True)
class Reading:
    """How the user wants the text of every source to be read."""

    text_field: str = "text"
    # Splits text files into documents; escapes such as `\\n` as the user typed them.
    document_separator: str | None = None
    split: str = "train"

    @property
    def separator(self) -> bytes:
        """Raises ValueError for an invalid escape."""
        # latin-1 with escapes is what this codec decodes; a plain encode() would break "é".
        typed = (self.document_separator or "").encode("latin-1", "backslashreplace")
        return typed.decode("unicode_escape").encode()


@dataclass(frozen=True)
class Refused:
    """A document that is skipped, counted and reported, such as an empty one.

    `broken` marks a row that its writer cannot have meant, such as a line that is not JSON: there
    is a bound on those. `detail` explains this one, where the reason is shared.
    """

    reason: str
    broken: bool = False
    detail: str = field(default="", compare=False)


class Unreadable(UserError):
    """The rest of a file cannot be read, such as one that is truncated: it counts as one broken row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.refused = Refused(reason, broken=True, detail=detail)


class LongDocument(Protocol):
    """A document above `LONG_BYTES`."""

    def blocks(self) -> Iterator[bytes]:
        """Its UTF-8 text from the beginning, on every call, in blocks that may end inside a
        character.
        """


Document = bytes | LongDocument | Refused


class Unit(Protocol):
    @property
    def size(self) -> int:
        """Bytes of text, as near as they are known before reading."""

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Each document with its position, for `locate`. Bytes are valid UTF-8, and may be empty."""

    def locate(self, position: int) -> str:
        """The position of a document in words: a file, and the byte or row in it."""


class Item(Protocol):
    """A piece of a corpus that is listed before any text is read: one unit, or a stream that has to
    be read in order.
    """

    @property
    def size(self) -> int:
        """Bytes of text, as near as they are known before reading: for progress, and to share the
        work.
        """

    def units(self) -> Iterator[Unit]:
        """The same units in the same order every time."""

    def locate(self, position: int) -> str:
        """As `locate` of its units."""


# The number of workers must not matter here: parts, and so a resumed preparation, are numbered by
# unit.
def unit_bytes(corpus_bytes: int) -> int:
    """How much text a unit of this corpus holds: the same for any number of workers."""
    return min(max(corpus_bytes // UNITS_IN_A_CORPUS, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


class OneUnit:
    """An item that is its only unit."""

    def units(self: Any) -> Iterator[Any]:
        yield self


@dataclass(frozen=True)
class Texts(OneUnit):
    """Documents that were already read, from row `first` of `source`."""

    texts: tuple[Document, ...]
    size: int
    source: str
    first: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        yield from enumerate(self.texts, start=self.first)

    def locate(self, position: int) -> str:
        return f"{self.source} row {position}"


@dataclass(frozen=True)
class Batch(OneUnit):
    """Small items that make one unit together: a hundred thousand small files are not as many
    units.
    """

    items: tuple[Item, ...]
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        for number, item in enumerate(self.items):
            for unit in item.units():
                for position, document in unit.documents():
                    yield number << POSITION_BITS | position, document

    def locate(self, position: int) -> str:
        return self.items[position >> POSITION_BITS].locate(position & ((1 << POSITION_BITS) - 1))


def grouped(
    found: Iterable[T], size_of: Callable[[T], int], most_bytes: int, most: int | None = None
) -> Iterator[tuple[tuple[T, ...], int]]:
    """Neighbours together, in groups of up to so many bytes and `most` values, each with its size.

    One that is larger than that is a group by itself.
    """
    group: list[T] = []
    size = 0
    for value in found:
        if group and (size + size_of(value) > most_bytes or len(group) == most):
            yield tuple(group), size
            group, size = [], 0
        group.append(value)
        size += size_of(value)
    if group:
        yield tuple(group), size


def utf8(content: bytes) -> Document:
    """The bytes as a document, or why they are none."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return Refused(NOT_UTF8, broken=True)
    return content


def encoded(text: str) -> bytes | Refused:
    """The text as a document; half of a surrogate pair, which JSON can hold, has no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return Refused(LONE_SURROGATE, broken=True)
