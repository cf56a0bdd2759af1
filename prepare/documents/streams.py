"""Files that can only be read in order: JSON, and compressed JSON lines. The parent splits them
into rows, workers parse.

A row is not parsed in the parent, so the text of a fault, and which rows are left out, is the same
as for plain files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from prepare.documents.jsontext import each_value, parse
from prepare.documents.lines import each_line
from prepare.formats import Format
from prepare.storage.compressed import text_blocks
from prepare.storage.files import shown
from prepare.units import Document, grouped

# Large enough that handing over a unit does not count, small enough that a few of them wait for
# each worker.
UNIT_BYTES = 4 << 20


class _InStream:
    path: str

    def locate(self, position: int) -> str:
        """By the byte of the decompressed text."""
        return f"{shown(self.path)} at byte {position} of its text"


@dataclass(frozen=True)
class Rows(_InStream):
    """JSON values with the bytes at which they begin; in JSON lines the first is line `first_line`."""

    path: str
    text_field: str
    rows: tuple[tuple[int, bytes], ...]
    first_line: int | None

    @property
    def size(self) -> int:
        return sum(len(row) for _, row in self.rows)

    def documents(self) -> Iterator[tuple[int, Document]]:
        for number, (begin, row) in enumerate(self.rows):
            if row.strip():
                yield begin, parse(row, self.text_field, lambda number=number: self._describe(number))  # type: ignore[misc]

    def _describe(self, number: int) -> str:
        if self.first_line is None:
            return self.locate(self.rows[number][0])
        return f"{shown(self.path)} line {self.first_line + number}"


@dataclass(frozen=True)
class Stream(_InStream):
    """A file of JSON values or of JSON lines, as units of some MB; a longer row is a unit alone."""

    path: str
    format: Format
    text_field: str
    size: int

    def units(self) -> Iterator[Rows]:
        lines = self.format is Format.JSON_LINES
        blocks, name = text_blocks(self.path), shown(self.path)
        found = each_line(blocks, name) if lines else each_value(blocks, name, self.text_field)
        first = 1
        # Blank lines count for a byte too, or a file of them would be one unit.
        for rows, _ in grouped(found, lambda row: len(row[1]) + 1, UNIT_BYTES):
            yield Rows(self.path, self.text_field, rows, first_line=first if lines else None)
            first += len(rows)
