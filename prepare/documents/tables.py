"""CSV and TSV -> the text column: quoted fields may hold newlines, the first row names the columns."""

import csv
import io
from collections.abc import Iterator

from pipeline.errors import UserError, one_line
from prepare.documents.fields import MOST_ROW_BYTES, TOO_LONG
from prepare.storage.files import BlockFile
from prepare.units import Refused, Unreadable

NOT_CSV = "not CSV"


def each_field(
    blocks: Iterator[bytes], name: str, *, text_field: str, delimiter: str
) -> Iterator[tuple[int, bytes | Refused]]:
    """The text of each row, and the line on which the row begins. Raises UserError for a header
    without the column.
    """
    rows = _rows(blocks, delimiter)
    for line, names in rows:
        if not isinstance(names, Refused):
            break
        if names.reason == NOT_CSV:
            raise UserError(f"the header of {name} is not CSV: {names.detail}")
        yield line, names
    else:
        return
    if names.count(text_field) != 1:
        found = f"{'several columns' if text_field in names else 'no column'} {text_field!r}"
        raise UserError(f"{name} has {found}, its columns are: {', '.join(names)}; choose one with --text-field")
    column = names.index(text_field)
    for line, row in rows:
        if isinstance(row, Refused):
            yield line, row
        elif len(row) == len(names):
            yield line, row[column].encode(errors="surrogateescape")
        elif row:  # not a blank line
            yield line, Refused(NOT_CSV, broken=True, detail=f"expected {len(names)} fields, got {len(row)}")


def _rows(blocks: Iterator[bytes], delimiter: str) -> Iterator[tuple[int, list[str] | Refused]]:
    """Each row with the line on which it begins."""
    csv.field_size_limit(MOST_ROW_BYTES)  # of the process; the default is 128 KB
    # Strict, or a quote that is never closed would take the rest of the file for one text.
    reader = csv.reader(_lines(blocks), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield line, Refused(NOT_CSV, broken=True, detail=one_line(error))
            if "field larger" in str(error):  # the reader is inside a quoted field
                return
            continue
        except Unreadable as fault:  # the rest of the file
            yield line, fault.refused
            return
        if row is None:
            return
        yield line, row


def _lines(blocks: Iterator[bytes]) -> Iterator[str]:
    # surrogateescape keeps bytes that are not UTF-8 as they are: they may be in another column.
    file = io.BufferedReader(BlockFile(blocks))
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    while line := text.readline(MOST_ROW_BYTES):
        if len(line) >= MOST_ROW_BYTES:
            raise Unreadable(TOO_LONG.reason, TOO_LONG.detail)
        yield line
