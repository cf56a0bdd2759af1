"""Reading Parquet: a unit is a slice of rows of one row group."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from prepare.readers import BLOCK_BYTES, NULL, Document, OneUnit, Refused, one_line, utf8

# A column of equal rows shrinks to nothing in Parquet's dictionary; this bounds what one step can unfold to.
MOST_ROWS = 8192


@dataclass(frozen=True)
class ParquetRows(OneUnit):
    """Rows [start, stop) of one row group, of which the file's row `first` is row 0. `batch` rows are read in a step."""

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

        try:
            row = self.start
            for rows in _row_group(self.path, self.column, self.group, self.batch).read(self.start, self.stop):
                yield from enumerate(_documents(rows), start=row)
                row += len(rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read {self.path} as Parquet: {one_line(error)}; fetch or write it again") from None

    def place(self, position: int) -> str:
        return f"{self.path} row {self.first + position}"


def _documents(rows: Any) -> Iterator[Document]:
    """The texts of an Arrow array, checked to be UTF-8 all at once where they are."""
    import pyarrow as pa

    try:
        rows.validate(full=True)
        known = True
    except pa.ArrowInvalid:
        known = False
    for content in rows.cast(pa.large_binary()).to_pylist():
        yield Refused(NULL) if content is None else content if known else utf8(content)


class _RowGroup:
    """A place in one row group. Skipping rows costs as much as reading them, and pq.write_table's groups have 1 M rows.

    Later units of a group lie further on, so a process that keeps its place reads each group once, not once a unit.
    """

    def __init__(self, path: str, column: str, group: int, batch: int) -> None:
        self._file = _parquet_file(path)
        self._options = {"batch_size": batch, "row_groups": [group], "columns": [column], "use_threads": False}
        self._rows: Any
        self._rewind()

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Rows [start, stop) as Arrow arrays of at most a step's rows."""
        if start < self._begin:
            self._rewind()
        while True:
            first, last = max(start - self._begin, 0), stop - self._begin
            if first < len(self._rows):
                yield self._rows[first:last]
            if last <= len(self._rows):
                return
            self._begin += len(self._rows)
            self._rows = self._next()

    def _rewind(self) -> None:
        self._batches = self._file.iter_batches(**self._options)
        self._begin = 0
        self._rows = self._next()

    def _next(self) -> Any:
        rows = next(self._batches).column(0)
        return rows.dictionary_decode() if hasattr(rows, "dictionary_decode") else rows


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int, batch: int) -> _RowGroup:
    return _RowGroup(path, column, group, batch)


def plan_parquet(path: Path, text_field: str, unit_bytes: int) -> Iterator[ParquetRows]:
    with _parquet_file(str(path)) as file:
        _check_text_column(file.schema_arrow, path, text_field)
        first = 0
        for group in range(file.metadata.num_row_groups):
            meta = file.metadata.row_group(group)
            chunks = (meta.column(i) for i in range(meta.num_columns))
            size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_field)
            rows = meta.num_rows
            batch = max(1, min(MOST_ROWS, BLOCK_BYTES * rows // max(size, 1)))
            rows_in_unit = max(batch, unit_bytes * rows // max(size, 1))
            for start in range(0, rows, rows_in_unit):
                stop = min(start + rows_in_unit, rows)
                share = size * (stop - start) // rows
                yield ParquetRows(str(path), text_field, group, first, start, stop, batch, share)
            first += rows


def _parquet_file(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered and not pre-buffered: otherwise a whole column chunk, often the whole file, is held in memory.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as Parquet: {one_line(error)}; fetch or write it again") from None


def _check_text_column(schema: Any, path: Path, text_field: str) -> None:
    import pyarrow.types as kinds

    if text_field not in schema.names:
        there = ", ".join(schema.names)
        raise UserError(
            f"{path} has no column {text_field!r}; the columns there are: {there}; choose with --text-field"
        )
    kind = schema.field(text_field).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(value) or kinds.is_large_string(value) or kinds.is_string_view(value)):
        raise UserError(
            f"{path}: the column {text_field!r} holds {kind}, wanted text; choose another with --text-field"
        )
