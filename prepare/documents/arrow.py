"""Arrow's IPC files and streams, such as `datasets` keeps in its cache.

Local files are mapped into memory, so that only the text column is read.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError, one_line
from prepare.documents.columns import as_bytes, check_text_column, damage, open_seekable, text_column
from prepare.storage.files import shown
from prepare.units import NULL, Refused

FILE_MAGIC = b"ARROW1"


def each_value_of_column(path: str, text_field: str) -> Iterator[tuple[int, bytes | Refused]]:
    """The texts, which may not be UTF-8, with the numbers of their rows.

    Raises UserError for a file that is not Arrow's, or without the column.
    """
    import pyarrow as pa

    try:
        batches = _batches(path, text_field)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {shown(path)} as Arrow: {one_line(error)}; download or write it again") from None
    row = 0
    try:
        for batch in batches:
            yield from enumerate(_values(batch, path, text_field), start=row)
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:  # how many rows are lost is unknown
        yield row, damage(error, path)


def _batches(path: str, text_field: str) -> Iterator[Any]:
    import pyarrow as pa

    file = open_seekable(path)
    source = pa.memory_map(file) if isinstance(file, str) else pa.PythonFile(file, "r")
    is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC  # else a stream, which has no index
    open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    source.seek(0)
    schema = open_reader(source).schema
    check_text_column(schema, path, text_field)
    name = text_field if text_field in schema.names else text_field.partition(".")[0]
    source.seek(0)
    reader = open_reader(source, options=pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)]))
    return map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)


def _values(batch: Any, path: str, text_field: str) -> Iterator[bytes | Refused]:
    import pyarrow as pa

    try:
        batch.validate()
        contents = as_bytes(text_column(batch, text_field))
    except pa.ArrowException as error:
        yield from [damage(error, path)] * batch.num_rows
        return
    for content in contents:
        value = content.as_py()
        yield Refused(NULL) if value is None else value
