"""The text column of Arrow data, in Parquet and in Arrow's own files -> documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.errors import UserError, one_line
from prepare.documents.fields import listed
from prepare.storage.compressed import DAMAGED
from prepare.storage.files import describe, is_url, open_bytes, reading, shown
from prepare.units import BLOCK_BYTES, LONG_BYTES, NULL, Document, Refused, utf8

# What the rows of one record batch may repeat of its dictionary.
MOST_REPEATED_BYTES = 256 << 20


@dataclass(frozen=True)
class LongValue:
    """A long document in an Arrow buffer, which is in memory anyway."""

    content: Any

    def blocks(self) -> Iterator[bytes]:
        for at in range(0, len(self.content), BLOCK_BYTES):
            yield self.content[at : at + BLOCK_BYTES].to_pybytes()


def check_text_column(schema: Any, path: str, text_field: str) -> None:
    """Raises UserError if no column, or field of a column, has that name and can hold text."""
    import pyarrow.types as kinds

    if schema.names.count(text_field) > 1:
        raise UserError(f"{shown(path)} has several columns {text_field!r}: write it again with one of them")
    fields = {name: schema.field(at).type for at, name in enumerate(schema.names)}
    kind = fields.get(text_field)
    for name in () if kind else text_field.split("."):
        kind = fields.get(name)
        fields = {each.name: each.type for each in kind} if kind and kinds.is_struct(kind) else {}
        if kind and kinds.is_null(kind):
            break
    if kind is None:
        raise UserError(
            f"{shown(path)} has no column {text_field!r}, its columns are: {listed(_nested(schema))}; "
            "choose one with --text-field"
        )
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    text = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    bytes_like = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view)  # they may be text
    # A column without a value in one file of many is written with the type null.
    if not any(is_kind(value) for is_kind in (*text, *bytes_like, kinds.is_null)):
        raise UserError(
            f"{shown(path)}: the column {text_field!r} holds {kind}, expected text; choose another column with --text-field"
        )


def _nested(fields: Any) -> dict[str, Any]:
    import pyarrow.types as kinds

    return {each.name: _nested(each.type) if kinds.is_struct(each.type) else None for each in fields}


def text_column(batch: Any, text_field: str) -> Any:
    """The column of a record batch, as it is stored."""
    import pyarrow.types as kinds

    names = [text_field] if text_field in batch.schema.names else text_field.split(".")
    column = batch.column(names[0])
    for name in names[1:]:
        if kinds.is_null(column.type):
            break
        # flatten, not field: where the struct is null, so is what it holds.
        column = column.flatten()[column.type.get_field_index(name)]
    return column


def as_bytes(column: Any) -> Any:
    """The texts as large_binary with valid offsets. Raises ArrowInvalid."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column.validate(full=True)  # an index beyond the dictionary would read other memory
        size = pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
        if size > MOST_REPEATED_BYTES:
            raise UserError(f"a dictionary column expands to {size:,} bytes in a record batch: write smaller batches")
        column = column.dictionary_decode()
    contents = column.cast(pa.large_binary())
    contents.validate(full=True)
    return contents


def documents_of(contents: Any) -> Iterator[Document]:
    """The documents of an array of large_binary.

    Arrow checks all of them for UTF-8; if one is not, each is checked alone.
    """
    import pyarrow as pa

    try:
        contents.cast(pa.large_string())
        known = True
    except pa.ArrowInvalid:
        known = False
    if contents.nbytes > LONG_BYTES:
        yield from (_document(scalar, known) for scalar in contents)
        return
    for content in contents.to_pylist():
        yield Refused(NULL) if content is None else content if known else utf8(content)


def _document(scalar: Any, known: bool) -> Document:
    if not scalar.is_valid:
        return Refused(NULL)
    content = scalar.as_buffer()
    if content.size > LONG_BYTES:  # the encoder finds out whether it is UTF-8
        return LongValue(content)
    return content.to_pybytes() if known else utf8(content.to_pybytes())


def open_seekable(path: str) -> str | BinaryIO:
    """A file for pyarrow, which reads local ones by their path. Raises UserError."""
    if not is_url(path):
        return path
    with reading(path):
        if not describe(path).ranges:
            raise UserError(f"the server of {shown(path)} does not support range requests: download the file first")
        return open_bytes(path)


def damage(error: Exception, path: str) -> Refused:
    """What rows give that `error` kept from being read.

    Raises UserError if not the file but the disk or the network failed: the rows may be good.
    """
    if isinstance(error, OSError) and (error.errno or is_url(path)):
        raise UserError(f"cannot read {shown(path)}: {error.strerror or one_line(error)}; run it again") from None
    return Refused(DAMAGED, broken=True, detail=one_line(error))
