"""Files by what their names say they hold -> items: the same for files of this machine and behind URLs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prepare.documents.lines import TextFile, plan_lines
from prepare.documents.parquet import plan_parquet
from prepare.documents.streams import Stream
from prepare.storage.compressed import COMPRESSIONS, USUAL_UNFOLDING, compression
from prepare.storage.files import name_of
from prepare.units import Batch, Item

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
READABLE = f"{' '.join(SUFFIXES)}, all but Parquet also packed as {' or '.join(COMPRESSIONS)}"


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus. Without `ranges`, as some web servers are, it can only be read from its beginning."""

    path: str
    size: int
    ranges: bool = True


def kind(name: str) -> str | None:
    """The suffix that says what a file's text is, packed or not; None where it cannot be read."""
    packing = compression(name)
    inner = name.lower().removesuffix(packing)
    found = next((suffix for suffix in SUFFIXES if inner.endswith(suffix)), None)
    return None if packing and found == ".parquet" else found


def plan(files: Iterable[SourceFile], text_field: str, unit_bytes: int, spool: str) -> Iterator[Item]:
    """The items of the files in their order; small ones that are neighbours share a unit."""
    small: list[Item] = []
    size = 0
    for file in files:
        for item in _items(file, text_field, unit_bytes, spool):
            if small and size + item.size > unit_bytes:
                yield _together(small, size)
                small, size = [], 0
            if item.size >= unit_bytes:
                yield item
            else:
                small.append(item)
                size += item.size
    if small:
        yield _together(small, size)


def _together(items: list[Item], size: int) -> Item:
    return items[0] if len(items) == 1 else Batch(tuple(items), size)


def _items(file: SourceFile, text_field: str, unit_bytes: int, spool: str) -> Iterator[Item]:
    name = name_of(file.path)
    suffix = kind(name)
    size = file.size * USUAL_UNFOLDING if compression(name) else file.size
    if suffix == ".parquet":
        yield from plan_parquet(file.path, file.size, text_field, unit_bytes)
    elif suffix in TEXT_SUFFIXES:
        yield TextFile(file.path, size)
    elif suffix == ".json" or compression(name) or not file.ranges:
        yield Stream(file.path, suffix == ".jsonl", text_field, spool, size)
    else:
        yield from plan_lines(file.path, file.size, text_field, unit_bytes)
