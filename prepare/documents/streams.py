"""Files that can only be read in order: the parent splits them into rows, workers make documents.

A row of JSON is not parsed in the parent, so which rows are refused, and why, is the same as for
plain JSON lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from prepare.documents.arrow import each_value_of_column
from prepare.documents.fields import MOST_ROW_BYTES, TOO_LONG
from prepare.documents.jsontext import each_value, parse
from prepare.documents.splitting import each_piece
from prepare.documents.tables import each_field
from prepare.documents.webarchive import each_record
from prepare.formats import Format
from prepare.storage.compressed import text_blocks
from prepare.storage.files import shown
from prepare.units import Document, Reading, Refused, grouped, utf8

# Large enough that handing over a unit does not count, small enough that a few of them wait for
# each worker.
UNIT_BYTES = 4 << 20
# A longer document of a text file is read again in the worker, from the beginning of the file.
MOST_TEXT_BYTES = 64 << 20
DELIMITERS = {Format.CSV: ",", Format.TSV: "\t"}


@dataclass(frozen=True)
class LongText:
    """The bytes [begin, end) of a file's text as a long document."""

    path: str
    begin: int
    end: int

    def blocks(self) -> Iterator[bytes]:
        at = 0
        for block in text_blocks(self.path):
            if found := block[max(self.begin - at, 0) : max(self.end - at, 0)]:
                yield found
            at += len(block)
            if at >= self.end:
                return


Row = bytes | LongText | Refused


@dataclass(frozen=True)
class Rows:
    """JSON values, or texts, with their positions."""

    stream: "Stream"
    rows: tuple[tuple[int, Row], ...]
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        for position, row in self.rows:
            if not isinstance(row, bytes):
                yield position, row
            elif self.stream.format not in (Format.JSON, Format.JSON_LINES):
                yield position, utf8(row)
            elif row.strip():
                yield position, parse(row, self.stream.reading.text_field)

    def locate(self, position: int) -> str:
        return self.stream.locate(position)


@dataclass(frozen=True)
class Stream:
    """A file as units of some MB; a longer row is a unit alone."""

    path: str
    format: Format
    reading: Reading
    size: int

    def units(self) -> Iterator[Rows]:
        # Blank lines count for a byte too, or a file of them would be one unit.
        for rows, size in grouped(self._rows(), lambda row: _bytes(row[1]) + 1, UNIT_BYTES):
            yield Rows(self, rows, size)

    def locate(self, position: int) -> str:
        """By the line of a table, the row of an Arrow file, or the byte of the decompressed text."""
        words = {Format.CSV: "line {}", Format.TSV: "line {}", Format.ARROW: "row {}"}
        where = words.get(self.format, "at byte {} of its text").format(position)
        return f"{shown(self.path)} {where}"

    def _rows(self) -> Iterator[tuple[int, Row]]:
        blocks, name = text_blocks(self.path), shown(self.path)
        match self.format:
            case Format.JSON:
                yield from each_value(blocks)
            case Format.JSON_LINES:
                for begin, line in each_piece(blocks, MOST_ROW_BYTES):
                    yield begin, TOO_LONG if isinstance(line, int) else line
            case Format.TEXT:
                for begin, text in each_piece(blocks, MOST_TEXT_BYTES, self.reading.separator):
                    yield begin, LongText(self.path, begin, text) if isinstance(text, int) else _or_empty(text)
            case Format.CSV | Format.TSV:
                delimiter = DELIMITERS[self.format]
                yield from each_field(blocks, name, text_field=self.reading.text_field, delimiter=delimiter)
            case Format.ARROW:
                yield from each_value_of_column(self.path, self.reading.text_field)
            case _:
                yield from each_record(blocks, name)


def _or_empty(text: bytes | Refused) -> bytes | Refused:
    """White space between two separators is not a document."""
    return text if isinstance(text, Refused) or text.strip() else b""


def _bytes(row: Row) -> int:
    if isinstance(row, LongText):
        return row.end - row.begin
    return len(row) if isinstance(row, bytes) else 0
