"""Reading Parquet: a unit is a slice of rows of one row group.

A file's footer claims how large its parts are. Those claims are checked against the file's size
before anything is read, and the rows of a step are limited by the longest value its dictionary can
repeat: a few KB of Parquet can expand to terabytes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.documents.columns import as_bytes, check_text_column, damage, documents_of, open_seekable, text_column
from prepare.storage.files import open_bytes, shown
from prepare.units import BLOCK_BYTES, Document, OneUnit

# Rows of one step, and of one unit: no size in the footer shows how much a dictionary repeats.
MOST_ROWS = 8192
MOST_ROWS_IN_UNIT = 1 << 15
# A step that may expand to more takes fewer rows, down to one.
STEP_BYTES = 16 << 20
# A larger dictionary is not decompressed to find its longest value.
DICTIONARY_BYTES = 16 << 20
# A row group that expands further is a bomb: text compresses to a third, and a dictionary of a few
# texts is not a corpus.
MOST_EXPANSION = 250
FREE_BYTES = 256 << 20
# Equal rows take almost no bytes, so a count up to this is believed.
ROWS_WITHOUT_BYTES = 1 << 26


@dataclass(frozen=True)
class ParquetRows(OneUnit):
    """Rows [start, stop) of one row group, which begins at the file's row `first`.

    `batch` rows are read in a step.
    """

    path: str
    column: str
    group: int
    first: int
    start: int
    stop: int
    batch: int
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        import pyarrow

        row = self.start
        try:
            group = _row_group(self.path, self.column, self.group, self.batch)
            for contents in group.read(self.start, self.stop):
                yield from enumerate(documents_of(contents), start=row)
                row += len(contents)
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            # Pages follow on each other, so the rest of the row group is lost with one of them.
            damaged = damage(error, self.path)
            yield from ((lost, damaged) for lost in range(row, self.stop))

    def locate(self, position: int) -> str:
        return f"{shown(self.path)} row {self.first + position}"


class _RowGroup:
    """A reader in one row group.

    Skipping rows costs as much as reading them, and pq.write_table's groups have 1 M rows.

    Units of a group come in order, so a process that keeps its reader reads each group once, not
    once a unit.
    """

    def __init__(self, path: str, column: str, group: int, batch: int) -> None:
        self._file = _parquet_file(path)
        chunk = _chunk(path, self._file, group=group, column=column)
        self._column = column
        self._most_bytes = _most_bytes(chunk.total_compressed_size)
        self._where = f"{shown(path)} row group {group}"
        batch = max(1, min(batch, STEP_BYTES // _longest_repeated(path, group, column, chunk)))
        self._options = {"batch_size": batch, "row_groups": [group], "columns": [column], "use_threads": False}
        self._begin: int
        self._rows: Any
        self._rewind()

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Rows [start, stop) as Arrow arrays of at most a step's rows."""
        if start < self._begin:
            self._rewind()
        # Batches do not end where units do, so the last one is kept for the next unit.
        while True:
            first, last = max(start - self._begin, 0), stop - self._begin
            if first < len(self._rows):
                yield self._rows[first:last]
            if last <= len(self._rows):
                return
            rows = self._next()
            self._begin, self._rows = self._begin + len(self._rows), rows

    def _rewind(self) -> None:
        self._batches = self._file.iter_batches(**self._options)
        self._begin = self._expanded = 0
        self._fault: Exception | None = None
        self._rows = ()
        self._rows = self._next()

    def _next(self) -> Any:
        # After a fault pyarrow goes on behind the damaged page, where the rows' numbers are lost.
        if self._fault:
            raise self._fault
        try:
            return self._read_batch()
        except Exception as error:
            self._fault = error
            raise

    def _read_batch(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            read = self._begin + len(self._rows)
            raise EOFError(f"{self._where} ends after {read} rows, fewer than its footer claims")
        rows = as_bytes(text_column(batch, self._column))
        self._expanded += rows.nbytes
        if self._expanded > self._most_bytes:
            raise _bomb(self._where, self._expanded, self._most_bytes)
        return rows


# One reader a process: a unit of the next row group, or of another file, takes its place.
@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int, batch: int) -> _RowGroup:
    return _RowGroup(path, column, group, batch)


def _longest_repeated(path: str, group: int, column: str, chunk: Any) -> int:
    """Bytes, or an upper bound, of the longest value in a chunk's dictionary, which any of its rows
    may repeat.
    """
    import pyarrow as pa

    if chunk.dictionary_page_offset is None:
        return 1
    page = _dictionary_bytes(path, chunk)
    if page > DICTIONARY_BYTES:
        return page
    # Read as a dictionary, a step of one row holds the dictionary page and no expanded values.
    with _parquet_file(path, read_dictionary=[column]) as file:
        batch = next(file.iter_batches(batch_size=1, row_groups=[group], columns=[column], use_threads=False), None)
        rows = text_column(batch, column) if batch is not None else pa.array([])
        if not pa.types.is_dictionary(rows.type) or not len(rows.dictionary):
            return 1
        values = rows.dictionary.cast(pa.large_binary()).to_pylist()
        return max((len(value or b"") for value in values), default=0) or 1


def _dictionary_bytes(path: str, chunk: Any) -> int:
    """The uncompressed size of a chunk's dictionary page, the second field of its header
    (PageHeader in parquet.thrift).
    """
    with open_bytes(path) as file:
        file.seek(chunk.dictionary_page_offset)
        head = file.read(32)
    fields = re.match(rb"\x15[\x80-\xff]*[\x00-\x7f]\x15([\x80-\xff]*[\x00-\x7f])", head)
    if fields is None:
        return int(chunk.total_uncompressed_size)
    number: int = sum((byte & 0x7F) << 7 * at for at, byte in enumerate(fields[1]))
    return number >> 1  # Thrift's zigzag encoding: the last bit is the sign


def split_rows(path: str, file_bytes: int, text_field: str, unit_bytes: int) -> Iterator[ParquetRows]:
    """The rows of a file in units of about so much text.

    Raises UserError for a damaged file and for a bomb.
    """
    for kept in (_footer, _row_group):  # the file may be another one than in an earlier run of this process
        kept.cache_clear()
    with _faults(path, "the footer"), _parquet_file(path) as file:
        check_text_column(file.schema_arrow, path, text_field)
        # Where a `meta` is null in all rows, its column stands for that of `meta.content`.
        outer = list(accumulate(text_field.split("."), "{}.{}".format))
        column = next(name for name in reversed(outer) if name in _footer(path)[1])
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows, size = _claims(file, path, file_bytes, group=group, column=column)
            # Sizes come from the footer, so units are the same for any number of workers and after
            # a kill; and batches for any unit, so that the same rows are lost to a damaged page.
            batch = max(1, min(MOST_ROWS, BLOCK_BYTES * rows // max(size, 1)))
            rows_in_unit = max(1, min(unit_bytes * rows // max(size, 1), MOST_ROWS_IN_UNIT))
            for start in range(0, rows, rows_in_unit):
                stop = min(start + rows_in_unit, rows)
                share = size * (stop - start) // rows
                yield ParquetRows(path, column, group, first=first, start=start, stop=stop, batch=batch, size=share)
            first += rows


def _claims(file: Any, path: str, file_bytes: int, group: int, column: str) -> tuple[int, int]:
    """The rows and the uncompressed bytes of a row group's text, as claimed, if the size of the
    file allows them.
    """
    rows, chunk = file.metadata.row_group(group).num_rows, _chunk(path, file, group=group, column=column)
    compressed, size = chunk.total_compressed_size, chunk.total_uncompressed_size
    where = f"{shown(path)} row group {group}"
    if not 0 <= compressed <= file_bytes or size < 0 or not 0 <= rows <= max(ROWS_WITHOUT_BYTES, size):
        raise UserError(
            f"{where} is damaged: it claims {rows:,} rows and {compressed:,} compressed bytes in a file of "
            f"{file_bytes:,}; download or write it again"
        )
    if size > (limit := _most_bytes(compressed)):
        raise _bomb(where, size, limit)
    return rows, size


def _most_bytes(compressed: int) -> int:
    return max(MOST_EXPANSION * compressed, FREE_BYTES)


def _bomb(where: str, size: int, limit: int) -> UserError:
    return UserError(
        f"{where} looks like a decompression bomb: it expands to {size:,} bytes or more, the limit is {MOST_EXPANSION} "
        f"times its compressed size, here {limit:,}; if that is intended, write it as JSON lines"
    )


def _chunk(path: str, file: Any, group: int, column: str) -> Any:
    """The metadata of the text in a row group; of two that are called `meta.content`, the larger."""
    chunks = map(file.metadata.row_group(group).column, _footer(path)[1][column])
    return max(chunks, key=lambda chunk: chunk.total_uncompressed_size)


@contextmanager
def _faults(path: str, part: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"cannot read {part} of {shown(path)} as Parquet: {one_line(error)}; download or write it again"
        ) from None


def _parquet_file(path: str, **options: Any) -> Any:
    import pyarrow.parquet

    file = open_seekable(path)
    with _faults(path, "the footer"):
        # Buffered and not pre-buffered: otherwise a whole column chunk, often the whole file, is
        # held in memory.
        options = {"pre_buffer": False, "buffer_size": 1 << 16, "page_checksum_verification": True, **options}
        return pyarrow.parquet.ParquetFile(file, metadata=_footer(path)[0], **options)


# Parsed once per process: with 500 columns and 200 row groups it has 100,000 entries.
@lru_cache(maxsize=2)
def _footer(path: str) -> tuple[Any, dict[str, list[int]]]:
    """The metadata of a file, and its columns by their names, as paths inside structs."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(open_seekable(path)).metadata
    columns: dict[str, list[int]] = {}
    for at in range(metadata.num_columns):
        columns.setdefault(metadata.schema.column(at).path, []).append(at)
    return metadata, columns
