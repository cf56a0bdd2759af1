"""Reading Parquet: a unit is a slice of rows of one row group."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from prepare import readers
from prepare.readers import UNIT_ROWS, one_line


@dataclass(frozen=True)
class ParquetRows:
    """Rows [start, stop) of one row group. `batch` is the step in which the row group is read."""

    path: str
    column: str
    group: int
    start: int
    stop: int
    batch: int
    size: int

    def documents(self) -> Iterator[str | None]:
        import pyarrow

        try:
            yield from _row_group(self.path, self.column, self.group, self.batch).read(self.start, self.stop)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read {self.path} as Parquet: {one_line(error)}; fetch or write it again") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: the column {self.column!r} is not UTF-8 in row group {self.group}, rows {self.start} to "
                f"{self.stop}: byte 0x{error.object[error.start]:02x} at byte offset {error.start} of the text"
            ) from None


class _RowGroup:
    """A place in one row group. Skipping rows costs as much as reading them, and pq.write_table's groups have 1 M rows.

    Later units of a group lie further on, so a process that keeps its place reads each group once, not once a unit.
    """

    def __init__(self, path: str, column: str, group: int, batch: int) -> None:
        self._file = _parquet_file(path)
        self._options = {"batch_size": batch, "row_groups": [group], "columns": [column], "use_threads": False}
        self._rows: Any
        self._rewind()

    def read(self, start: int, stop: int) -> Iterator[str | None]:
        if start < self._begin:
            self._rewind()
        while True:
            first, last = max(start - self._begin, 0), stop - self._begin
            if first < len(self._rows):
                yield from self._rows[first:last].to_pylist()
            if last <= len(self._rows):
                return
            self._begin += len(self._rows)
            self._rows = next(self._batches).column(0)

    def _rewind(self) -> None:
        self._batches = self._file.iter_batches(**self._options)
        self._begin = 0
        self._rows = next(self._batches).column(0)


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int, batch: int) -> _RowGroup:
    return _RowGroup(path, column, group, batch)


def plan_parquet(path: Path, text_field: str) -> Iterator[ParquetRows]:
    with _parquet_file(str(path)) as file:
        _check_text_column(file.schema_arrow, path, text_field)
        for group in range(file.metadata.num_row_groups):
            meta = file.metadata.row_group(group)
            chunks = (meta.column(i) for i in range(meta.num_columns))
            size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_field)
            rows = meta.num_rows
            at_once = max(1, min(UNIT_ROWS, readers.UNIT_BYTES * rows // max(size, 1)))
            for start in range(0, rows, at_once):
                stop = min(start + at_once, rows)
                yield ParquetRows(str(path), text_field, group, start, stop, at_once, size * (stop - start) // rows)


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
