"""Arrow's IPC files and streams, such as `datasets` keeps in its cache: a unit is a range of rows.

Local files are mapped into memory, so that only the text column is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.documents.columns import as_bytes, check_text_column, damage, documents_of, open_seekable, text_column
from prepare.storage.compressed import DAMAGED
from prepare.storage.files import shown
from prepare.units import Document, OneUnit, Refused, grouped

FILE_MAGIC = b"ARROW1"
# A dictionary or a null takes almost no bytes.
MOST_ROWS_IN_UNIT = 1 << 15


@dataclass(frozen=True)
class ArrowRows(OneUnit):
    """Rows [start, stop) of a file; record batch `batch` begins at row `first`, and `start` lies in
    it.
    """

    path: str
    column: str
    batch: int
    first: int
    start: int
    stop: int
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        import pyarrow as pa

        batches, first, number = _batches(self.path, self.column), self.first, self.batch
        while first < self.stop:
            try:
                rows, contents = batches.read(number)
            except (pa.ArrowException, OSError) as error:
                yield first, damage(error, self.path)
                return
            begin, end = max(self.start - first, 0), min(self.stop - first, rows)
            if isinstance(contents, Refused):
                yield from ((first + at, contents) for at in range(begin, end))
            else:
                yield from enumerate(documents_of(contents[begin:end]), start=first + begin)
            first, number = first + rows, number + 1

    def locate(self, position: int) -> str:
        return f"{shown(self.path)} row {position}"


class _Batches:
    """The record batches of a file, of which the last one that was read is kept.

    Units come in order, so a stream, which has no index, is read once by each process.
    """

    def __init__(self, path: str, column: str) -> None:
        import pyarrow as pa

        file = open_seekable(path)
        self._source = pa.memory_map(file) if isinstance(file, str) else pa.PythonFile(file, "r")
        self._column = column
        self._kept: tuple[int, Any]
        is_file = self._source.read(len(FILE_MAGIC)) == FILE_MAGIC
        self._open = pa.ipc.open_file if is_file else pa.ipc.open_stream
        self._source.seek(0)
        schema = self._open(self._source).schema
        check_text_column(schema, path, column)
        name = column if column in schema.names else column.partition(".")[0]
        self._options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)], use_threads=False)
        self._rewind()

    def read(self, number: int) -> tuple[int, Any]:
        """The rows of a batch, and its texts as large_binary, or why all of them are refused.

        Raises ArrowException or OSError for a batch that cannot be found, EOFError after the last.
        """
        if self._kept[0] != number:
            try:
                self._kept = number, self._texts(self._batch(number))
            except Exception:
                self._rewind()  # or the next call would read on after the fault
                raise
        texts: tuple[int, Any] = self._kept[1]
        return texts

    def _rewind(self) -> None:
        self._source.seek(0)
        self._reader, self._next = self._open(self._source, options=self._options), 0
        self._kept = (-1, None)

    def _batch(self, number: int) -> Any:
        if hasattr(self._reader, "get_batch"):
            if number == self._reader.num_record_batches:
                raise EOFError
            return self._reader.get_batch(number)
        if number < self._next:
            self._rewind()
        while True:
            try:
                batch = self._reader.read_next_batch()
            except StopIteration:
                raise EOFError from None
            self._next += 1
            if self._next > number:
                return batch

    def _texts(self, batch: Any) -> tuple[int, Any]:
        import pyarrow as pa

        try:
            batch.validate()
            return batch.num_rows, as_bytes(text_column(batch, self._column))
        except pa.ArrowException as error:
            return batch.num_rows, Refused(DAMAGED, broken=True, detail=one_line(error))


# One file a process: a unit of another file takes its place.
@lru_cache(maxsize=1)
def _batches(path: str, column: str) -> _Batches:
    return _Batches(path, column)


def split_batches(path: str, text_field: str, unit_bytes: int) -> Iterator[ArrowRows]:
    """The rows of a file in units of about so much text. Raises UserError for a file that is not
    Arrow's.
    """
    import pyarrow as pa

    try:
        _batches.cache_clear()  # the file may be another one than in an earlier run of this process
        batches = _Batches(path, text_field)  # not the kept one, which units read meanwhile
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {shown(path)} as Arrow: {one_line(error)}; download or write it again") from None
    for slices, size in grouped(_slices(batches, unit_bytes), lambda each: each[-1], unit_bytes):
        (number, first, start, *_), (_, _, _, stop, _) = slices[0], slices[-1]
        yield ArrowRows(path, text_field, batch=number, first=first, start=start, stop=stop, size=size)


def _slices(batches: _Batches, unit_bytes: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each batch the rows that fit a unit: its number, its first row, start, stop, bytes."""
    import pyarrow as pa

    first = 0
    for number in count():
        try:
            rows, contents = batches.read(number)
        except EOFError:
            return
        except (pa.ArrowException, OSError):
            # How many rows are lost is unknown: one stands for them, and its unit refuses it.
            yield number, first, first, first + 1, 0
            return
        size = rows if isinstance(contents, Refused) else contents.nbytes
        step = max(1, min(unit_bytes * rows // max(size, 1), MOST_ROWS_IN_UNIT))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield number, first, first + start, first + stop, size * (stop - start) // rows
        first += rows
