"""Whole files and lines as documents: units that know a place in a file and read it in the worker."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prepare.documents.jsontext import parse, parse_long
from prepare.storage.compressed import BYTE_ORDER_MARK, text_blocks
from prepare.storage.files import blocks, shown
from prepare.units import LONG_BYTES, STDIN_SPOOL, Document, OneUnit, utf8


@dataclass(frozen=True)
class FileText:
    """A whole file as a long document; packed ones are unpacked each time they are read."""

    path: str

    def blocks(self) -> Iterator[bytes]:
        return text_blocks(self.path)


@dataclass(frozen=True)
class TextFile(OneUnit):
    """A file that is one document."""

    path: str
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        held = bytearray()
        for block in text_blocks(self.path):
            held += block
            if len(held) > LONG_BYTES:
                yield 0, FileText(self.path)
                return
        yield 0, utf8(bytes(held))

    def place(self, position: int) -> str:
        return shown(self.path)


@dataclass(frozen=True)
class LineText:
    """The bytes [begin, end) of a file as a long document."""

    path: str
    begin: int
    end: int

    def blocks(self) -> Iterator[bytes]:
        return blocks(self.path, self.begin, self.end)


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
            if isinstance(line, LineText):
                yield begin, self._long(line)
            elif self.text_field is None:
                yield begin, utf8(line.removesuffix(b"\r"))
            elif line.strip():
                yield begin, parse(line, self.text_field, lambda begin=begin: self._line(begin))  # type: ignore[misc]

    def place(self, position: int) -> str:
        return f"{self._shown} at byte {position}"

    @property
    def _shown(self) -> str:
        return "stdin" if Path(self.path).name == STDIN_SPOOL else shown(self.path)

    def _long(self, line: LineText) -> Document:
        if self.text_field is not None:
            return parse_long(line.path, line.begin, line.end, self.text_field, lambda: self._line(line.begin))
        last = b"".join(blocks(line.path, line.end - 1, line.end))
        return LineText(line.path, line.begin, line.end - 1) if last == b"\r" else line

    def _lines(self) -> Iterator[tuple[int, bytes | LineText]]:
        """A line that is too long to hold is passed over, and read again by whoever wants it."""
        begin = self._first()
        at, held = begin, b""
        for block in blocks(self.path, begin) if begin < self.stop else ():
            *ended, rest = block.split(b"\n")
            for line in ended:
                at += len(line) + 1
                long = at - 1 - begin > LONG_BYTES
                yield begin, LineText(self.path, begin, at - 1) if long else held + line
                begin, held = at, b""
                if begin >= self.stop:
                    return
            at += len(rest)
            held = held + rest if at - begin <= LONG_BYTES else b""
        if at > begin:
            yield begin, LineText(self.path, begin, at) if at - begin > LONG_BYTES else held

    def _first(self) -> int:
        """Where the first line of this unit begins; `stop` where none does."""
        if not self.start:
            head = b"".join(blocks(self.path, 0, len(BYTE_ORDER_MARK)))
            return len(head) if head == BYTE_ORDER_MARK else 0
        # From the byte before: where that is a line's end, the line at `start` is ours.
        at = self.start - 1
        for block in blocks(self.path, at, self.stop):
            cut = block.find(b"\n")
            if cut >= 0:
                return at + cut + 1
            at += len(block)
        return self.stop

    def _line(self, begin: int) -> str:
        """Counted only when an error needs it: units know bytes, people know lines."""
        return f"{self._shown} line {1 + sum(block.count(10) for block in blocks(self.path, 0, begin))}"


def plan_lines(path: str, size: int, text_field: str | None, unit_bytes: int) -> Iterator[Lines]:
    for start in range(0, size, unit_bytes):
        yield Lines(path, start, min(start + unit_bytes, size), text_field)
