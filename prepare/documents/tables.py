"""CSV and TSV -> the text column: quoted fields may hold newlines, the first row names the columns."""

import csv
import io
from collections.abc import Iterator

from pipeline.errors import UserError, one_line
from prepare.documents.fields import MOST_ROW_BYTES, TOO_LONG
from prepare.storage.blocks import BlockFile
from prepare.units import Refused, Unreadable

NOT_CSV = "not CSV"


class _Lines:
    """The lines of a text, with their ends; `number` counts those that were read, from 1."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        # surrogateescape keeps bytes that are not UTF-8 as they are: they may be in another column.
        file = io.BufferedReader(BlockFile(blocks))
        self._file = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(MOST_ROW_BYTES)
        self.number += 1
        if len(line) >= MOST_ROW_BYTES:
            raise Unreadable(TOO_LONG.reason, TOO_LONG.detail)
        if not line:
            raise StopIteration
        return line


def each_field(
    blocks: Iterator[bytes], name: str, *, text_field: str, delimiter: str
) -> Iterator[tuple[int, bytes | Refused]]:
    """The text of each row, and the line on which the row begins. Raises UserError for a header
    without the column.
    """
    csv.field_size_limit(MOST_ROW_BYTES)  # of the process; the default is 128 KB
    lines = _Lines(blocks)
    # Strict, or a quote that is never closed would take the rest of the file for one text.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(reader, None)
    except csv.Error as error:
        raise UserError(f"the header of {name} is not CSV: {one_line(error)}") from None
    except Unreadable as fault:
        yield 1, fault.refused
        return
    if names is None:
        return
    if names.count(text_field) != 1:
        found = f"{'several columns' if text_field in names else 'no column'} {text_field!r}"
        raise UserError(f"{name} has {found}, its columns are: {', '.join(names)}; choose one with --text-field")
    column = names.index(text_field)
    while True:
        line = lines.number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield line, Refused(NOT_CSV, broken=True, detail=one_line(error))
            if "field larger" in str(error):  # the reader is inside a quoted field
                return
            continue
        except Unreadable as fault:
            yield line, fault.refused
            return
        if row is None:
            return
        if len(row) == len(names):
            yield line, row[column].encode(errors="surrogateescape")
        elif row:  # not a blank line
            yield line, Refused(NOT_CSV, broken=True, detail=f"expected {len(names)} fields, got {len(row)}")
