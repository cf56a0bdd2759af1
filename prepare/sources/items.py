"""What a source is, and files -> items by what their names tell: the same for local files and those
behind URLs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from pipeline.files import hash_bytes
from prepare.documents.lines import TextFile, is_utf8, split_lines
from prepare.documents.parquet import split_rows
from prepare.documents.streams import Stream
from prepare.formats import Format, compression_of, format_of
from prepare.storage.files import StoredFile, local_file, name_of
from prepare.units import MOST_IN_BATCH, Batch, Item, Reading, Unit

# English compresses to about a third, and Parquet's pages to about a half: for progress, and for
# the disk space needed.
USUAL_EXPANSION, PARQUET_EXPANSION = 3, 2
# What opening a file costs, as bytes of text: a batch of empty files ends too.
FILE_COST_BYTES = 64


@dataclass(frozen=True)
class Source:
    """What the user named, as files; one of another kind overrides `stored` and `split`.

    `passed_over`: what lies below it and is not read: reason -> `count` and one `example`.
    `has_splits`: whether `reading.split` chooses what is read.
    """

    reading: Reading
    passed_over: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True, repr=False)
    has_splits: bool = field(default=False, kw_only=True, repr=False)
    is_stream: ClassVar[bool] = False  # the size of one is not known

    def files(self) -> list[Path]:
        """The local files whose hashes `record` needs."""
        return []

    def stored(self) -> list[StoredFile]:
        """All files in order, each with what changes when its content does: its size, and its
        modification time or the server's ETag.
        """
        return [local_file(path) for path in self.files()]

    def split(self, file: StoredFile, unit_bytes: int) -> Iterator[Item]:
        """A file in pieces, in order; their units hold about so much text."""
        return _items(file, self.reading, unit_bytes)

    def ready(self, files: list[StoredFile]) -> Iterator[StoredFile]:
        """The files in order, each once it can be read."""
        return iter(files)

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """The manifest's entries for this source."""
        raise NotImplementedError


def keyed_items(files: Iterable[StoredFile], source: Source, unit_bytes: int) -> Iterator[tuple[str, Item]]:
    """The items of a source's files in order, each with the key of its parts; small ones share a unit.

    The key follows from all that the cutting follows from: the items, which hold their positions
    and the reading options, and the stamps of their files.
    """
    batch: list[tuple[str, Item]] = []
    size = 0
    for piece in chain(_pieces(files, source, unit_bytes), [None]):
        if batch and (piece is None or size + piece[1].size > 2 * unit_bytes or len(batch) == MOST_IN_BATCH):
            yield _joined(batch, size)
            batch, size = [], 0
        if piece is not None:
            batch.append(piece)
            size += piece[1].size


def _pieces(files: Iterable[StoredFile], source: Source, unit_bytes: int) -> Iterator[tuple[str, Item] | None]:
    """Each item with its description; None where a batch has to end."""
    for file in files:
        items = list(source.split(file, unit_bytes))
        # A large file shares no unit with others, so that it can change alone.
        alone = sum(item.size for item in items) >= unit_bytes
        yield from [None] * alone
        for item in items:
            yield f"{item!r} {file!r}", item
            yield from [None] * _ends_batch(item, unit_bytes)
        yield from [None] * alone


def _ends_batch(item: Item, unit_bytes: int) -> bool:
    """Whether a batch ends with the item, after half a unit on average.

    Decided by the item alone, so that a file that is added or removed changes the batch that it is
    in and, but for the largest batches, no other.
    """
    chance = 2 * (item.size + FILE_COST_BYTES) / unit_bytes
    return xxhash.xxh3_64_intdigest(_bytes(repr(item))) < chance * (1 << 64)


def _joined(batch: list[tuple[str, Item]], size: int) -> tuple[str, Item]:
    key = hash_bytes(_bytes("\n".join(description for description, _ in batch)))
    items = tuple(item for _, item in batch)
    return key, items[0] if len(items) == 1 else Batch(items, size)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # a name need not be UTF-8


def usual_text_bytes(file: StoredFile) -> int:
    """Bytes of text in a file, as near as its name and size tell."""
    name = name_of(file.path)
    if compression_of(name):
        return file.size * USUAL_EXPANSION
    return file.size * (PARQUET_EXPANSION if format_of(name) is Format.PARQUET else 1)


def _items(file: StoredFile, reading: Reading, unit_bytes: int) -> Iterator[Item]:
    name = name_of(file.path)
    size = usual_text_bytes(file)
    match format_of(name):
        case Format.PARQUET:
            yield from split_rows(file.path, file.size, reading.text_field, unit_bytes)
        case Format.TEXT if not reading.document_separator:
            yield TextFile(file.path, size)
        # What can be read from any byte is split here, and its units read themselves; the rest is a
        # stream.
        case Format.JSON_LINES if file.ranges and not compression_of(name) and is_utf8(file.path):
            yield from split_lines(file.path, file.size, reading.text_field, unit_bytes)
        case format:
            assert format is not None  # only readable files come here
            yield Stream(file.path, format, reading, size=size)


def units_with_fields(item: Item) -> Iterator[Unit]:
    """The units of an item whose documents are fields of rows, and not text alone."""
    for each in item.items if isinstance(item, Batch) else (item,):
        if not isinstance(each, TextFile) and getattr(each, "format", None) not in (Format.TEXT, Format.WARC):
            yield from each.units()
