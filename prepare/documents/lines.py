"""Text files and lines as documents: units that know a range of a file and read it in the worker."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from prepare.documents.fields import MOST_ROW_BYTES, TOO_LONG
from prepare.documents.jsontext import parse
from prepare.documents.splitting import each_piece
from prepare.storage.compressed import BYTE_ORDER_MARK, HEAD_BYTES, UTF8, encoding_of, text_blocks
from prepare.storage.files import blocks, is_url, open_bytes, reading, shown
from prepare.units import LONG_BYTES, STDIN_SPOOL, Document, OneUnit, Refused, Unreadable, utf8


@dataclass(frozen=True)
class TextFile(OneUnit):
    """A file that is one document; a long one is read, and decompressed, each time it is needed."""

    path: str
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        held = bytearray()
        try:
            for block in text_blocks(self.path):
                held += block
                if len(held) > LONG_BYTES:
                    yield 0, self
                    return
        except Unreadable as fault:
            yield 0, fault.refused
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
            if isinstance(line, LineText):
                if line.end - line.begin > MOST_ROW_BYTES:
                    yield begin, TOO_LONG
                    continue
                line = b"".join(line.blocks())
            if line.strip():
                yield begin, parse(line, self.text_field)

    def locate(self, position: int) -> str:
        name = "stdin" if Path(self.path).name == STDIN_SPOOL else shown(self.path)
        return f"{name} at byte {position}"

    def _plain(self, line: bytes | LineText) -> Document:
        """The line as a document, without a carriage return at its end."""
        if isinstance(line, bytes):
            return utf8(line.removesuffix(b"\r"))
        last = b"".join(blocks(line.path, line.end - 1, line.end))
        return LineText(line.path, line.begin, line.end - (last == b"\r"))

    def _lines(self) -> Iterator[tuple[int, bytes | LineText]]:
        """A long line is passed over, and read again when its text is needed."""
        first = self._first()
        if first == self.stop:
            return
        for offset, line in each_piece(blocks(self.path, first), LONG_BYTES):
            begin = first + offset
            if begin >= self.stop:  # that line is the first of the next unit
                return
            assert not isinstance(line, Refused)  # plain files have nothing that could be damaged
            yield begin, LineText(self.path, begin, first + line) if isinstance(line, int) else line

    def _first(self) -> int:
        """Where the first line of this unit begins; `stop` if none does."""
        if not self.start:
            head = b"".join(blocks(self.path, 0, len(BYTE_ORDER_MARK)))
            if encoding_of(head) != UTF8:
                raise UserError(f"{shown(self.path)} is in UTF-16: download it first")
            return len(head) if head == BYTE_ORDER_MARK else 0
        # From the byte before: if that one ends a line, the line at `start` is ours.
        at = self.start - 1
        for block in blocks(self.path, at, self.stop):
            newline = block.find(b"\n")
            if newline >= 0:
                return at + newline + 1
            at += len(block)
        return self.stop


def is_utf8(path: str) -> bool:
    """Whether the lines of a file can be split as bytes.

    Nothing is asked of a server, which would cost a request a file: `Lines` refuses what is not.
    """
    if is_url(path):
        return True
    with reading(path), open_bytes(path) as file:
        return encoding_of(file.read(HEAD_BYTES)) == UTF8


def split_lines(path: str, size: int, text_field: str | None, unit_bytes: int) -> Iterator[Lines]:
    """The lines of a file in units of so many bytes."""
    for start in range(0, size, unit_bytes):
        yield Lines(path, start, min(start + unit_bytes, size), text_field)
