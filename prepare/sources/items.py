"""What a source is, and files -> items by what their names tell: the same for local files and those
behind URLs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare.documents.lines import TextFile, split_lines
from prepare.documents.parquet import split_rows
from prepare.documents.streams import Stream
from prepare.formats import Format, compression_of, format_of
from prepare.storage.files import StoredFile, name_of
from prepare.units import Batch, Item, Reading, grouped

# English compresses to about a third: for progress, and to share the work.
USUAL_EXPANSION = 3


@dataclass(frozen=True)
class Source:
    """What the user named, as files; one of another kind overrides `items` and `file_bytes`."""

    reading: Reading

    def files(self) -> list[Path]:
        """The local files whose hashes `record` needs."""
        return []

    def stored(self) -> list[StoredFile]:
        """All files, in order."""
        return [StoredFile(str(path), path.stat().st_size) for path in self.files()]

    def items(self, unit_bytes: int) -> list[Item]:
        """The source in pieces, in order; their units hold about so much text."""
        return items_of(self.stored(), self.reading, unit_bytes)

    def file_bytes(self) -> int | None:
        """None for a stream."""
        return sum(file.size for file in self.stored())

    def stamps(self) -> dict[str, Any]:
        """By file, what changes with it and is known without reading it, such as its size and
        modification time.
        """
        raise NotImplementedError

    def passed_over(self) -> dict[str, dict[str, Any]]:
        """What lies below the source and is not read: reason -> `count` and one `example`."""
        return {}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """The manifest's entries for this source."""
        raise NotImplementedError


def items_of(files: Iterable[StoredFile], reading: Reading, unit_bytes: int) -> list[Item]:
    """The items of the files in their order; small neighbours share a unit."""
    items = (item for file in files for item in _items(file, reading, unit_bytes))
    groups = grouped(items, lambda item: item.size, unit_bytes)
    return [group[0] if len(group) == 1 else Batch(group, size) for group, size in groups]


def _items(file: StoredFile, reading: Reading, unit_bytes: int) -> Iterator[Item]:
    name = name_of(file.path)
    size = file.size * USUAL_EXPANSION if compression_of(name) else file.size
    match format_of(name):
        case Format.PARQUET:
            yield from split_rows(file.path, file.size, reading.text_field, unit_bytes)
        case Format.TEXT:
            yield TextFile(file.path, size)
        # What can be read from any byte is split here, and its units read themselves; the rest is a
        # stream.
        case Format.JSON_LINES if file.ranges and not compression_of(name):
            yield from split_lines(file.path, file.size, reading.text_field, unit_bytes)
        case format:
            assert format is not None  # only readable files come here
            yield Stream(file.path, format, reading.text_field, size)
