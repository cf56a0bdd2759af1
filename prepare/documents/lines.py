"""Text files and lines as documents: units that know a range of a file and read it in the worker."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prepare.documents.jsontext import MOST_VALUE_BYTES, parse, too_long
from prepare.storage.compressed import BYTE_ORDER_MARK, text_blocks
from prepare.storage.files import blocks, shown
from prepare.units import LONG_BYTES, STDIN_SPOOL, Document, OneUnit, utf8


@dataclass(frozen=True)
class TextFile(OneUnit):
    """A file that is one document; a long one is read, and decompressed, each time it is needed."""

    path: str
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        held = bytearray()
        for block in text_blocks(self.path):
            held += block
            if len(held) > LONG_BYTES:
                yield 0, self
                return
        yield 0, utf8(bytes(held))

    def blocks(self) -> Iterator[bytes]:
        return text_blocks(self.path)

    def locate(self, position: int) -> str:
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
    """The lines of a file that begin in bytes [start, stop), so that neighbours share no line and
    skip none.

    With a text field a line is a JSON object, and blank lines are skipped; without one every line
    is a document.
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
                yield begin, self._plain(line)
                continue
            content = self._held(line) if isinstance(line, LineText) else line
            if content.strip():
                yield begin, parse(content, self.text_field, lambda begin=begin: self._number(begin))  # type: ignore[misc]

    def locate(self, position: int) -> str:
        return f"{self._shown} at byte {position}"

    @property
    def _shown(self) -> str:
        return "stdin" if Path(self.path).name == STDIN_SPOOL else shown(self.path)

    def _held(self, line: LineText) -> bytes:
        if line.end - line.begin > MOST_VALUE_BYTES:
            raise too_long(self._number(line.begin))
        return b"".join(line.blocks())

    def _plain(self, line: bytes | LineText) -> Document:
        """The line as a document, without a carriage return at its end."""
        if isinstance(line, bytes):
            return utf8(line.removesuffix(b"\r"))
        last = b"".join(blocks(line.path, line.end - 1, line.end))
        return LineText(line.path, line.begin, line.end - (last == b"\r"))

    def _lines(self) -> Iterator[tuple[int, bytes | LineText]]:
        """A long line is passed over, and read again when its text is needed."""
        # `at` counts the bytes read, `begin` is where the present line began, `held` is its text so
        # far.
        begin = self._first()
        at, held = begin, b""
        for block in blocks(self.path, begin) if begin < self.stop else ():
            *ended, rest = block.split(b"\n")
            for line in ended:
                at += len(line) + 1
                long = at - 1 - begin > LONG_BYTES
                yield begin, LineText(self.path, begin, at - 1) if long else held + line
                begin, held = at, b""
                if begin >= self.stop:  # that line is the first of the next unit
                    return
            at += len(rest)
            # Of a long line only the end is looked for.
            held = held + rest if at - begin <= LONG_BYTES else b""
        if at > begin:
            yield begin, LineText(self.path, begin, at) if at - begin > LONG_BYTES else held

    def _first(self) -> int:
        """Where the first line of this unit begins; `stop` if none does."""
        if not self.start:
            head = b"".join(blocks(self.path, 0, len(BYTE_ORDER_MARK)))
            return len(head) if head == BYTE_ORDER_MARK else 0
        # From the byte before: if that one ends a line, the line at `start` is ours.
        at = self.start - 1
        for block in blocks(self.path, at, self.stop):
            newline = block.find(b"\n")
            if newline >= 0:
                return at + newline + 1
            at += len(block)
        return self.stop

    def _number(self, begin: int) -> str:
        """The line's number, counted only when an error needs it: units know bytes, editors know
        lines.
        """
        return f"{self._shown} line {1 + sum(block.count(10) for block in blocks(self.path, 0, begin))}"


def split_lines(path: str, size: int, text_field: str | None, unit_bytes: int) -> Iterator[Lines]:
    """The lines of a file in units of so many bytes."""
    for start in range(0, size, unit_bytes):
        yield Lines(path, start, min(start + unit_bytes, size), text_field)


def each_line(blocks: Iterator[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a text, blank ones too: the byte at which each begins, and its bytes."""
    begin, number = 0, 1
    held = bytearray()
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for end in ended:
            # A bytearray grows in place: joining bytes would copy a line of n blocks n times.
            line = bytes(held) + end if held else end
            yield begin, line
            begin, number = begin + len(line) + 1, number + 1
            held.clear()
        held += rest
        if len(held) > MOST_VALUE_BYTES:
            raise too_long(f"{name} line {number}")
    if held:
        yield begin, bytes(held)
