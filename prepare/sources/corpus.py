"""Where text comes from: a corpus is one or more sources, named by the user; each becomes small
units of work.

The parent only lists them, in the corpus's order; a unit reads itself in the process that encodes
it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from prepare.sources.hub import open_hub
from prepare.sources.items import Source
from prepare.sources.local import Stdin, open_files, open_shakespeare, open_stdlib
from prepare.sources.names import SOURCE_KINDS, did_you_mean, hub_source, without_file_protocol
from prepare.sources.remote import open_remote
from prepare.storage.files import is_url, shown
from prepare.units import STDIN_SPOOL, Item, Reading, unit_bytes

# Of a source that does not exist: it may be a text that someone forgot to write to a file.
LONGEST_QUOTE = 200


@dataclass(frozen=True)
class Corpus:
    """All sources of one dataset, in the order given."""

    sources: list[Source]

    def items(self) -> list[Item]:
        return self._items

    # Listed once: it reads the footer of every Parquet file, which may lie behind a network.
    @cached_property
    def _items(self) -> list[Item]:
        size = unit_bytes(self.file_bytes() or 0)
        return [item for source in self.sources for item in source.items(size)]

    def text_bytes(self) -> int:
        """Bytes of text, as near as they are known before reading."""
        return sum(item.size for item in self._items)

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]

    def file_bytes(self) -> int | None:
        """Bytes of all source files; None if one of them is a stream."""
        sizes = [source.file_bytes() for source in self.sources]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def stamps(self) -> dict[str, Any]:
        return {name: stamp for source in self.sources for name, stamp in source.stamps().items()}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [entry for source in self.sources for entry in source.record(hash_of)]


def open_corpus(sources: list[str], reading: Reading, folder: Path) -> Corpus:
    """Resolve what the user typed; `folder` keeps a copy of stdin.

    Raises UserError for what does not exist.
    """
    if not all(sources) or not sources:  # an unset shell variable gives an empty one: not the working folder
        raise UserError(f"no source given: expected {SOURCE_KINDS}")
    if sources.count("-") > 1:
        raise UserError("stdin (-) is given twice as a source: it can be read only once")
    seen: set[str] = set()
    return Corpus([_open_source(source, reading, folder, seen) for source in sources])


def _open_source(source: str, reading: Reading, folder: Path, seen: set[str]) -> Source:
    hub = hub_source(source)
    if hub is not None:
        return open_hub(hub, reading, seen)
    if source == "stdlib":
        return open_stdlib(reading, seen)
    if source == "shakespeare":
        return open_shakespeare(reading, seen)
    if source == "-":
        return Stdin(reading, folder / STDIN_SPOOL)
    if is_url(source) and not source.partition("://")[2].strip("/"):
        raise UserError(f"{shown(source)} is not a complete URL: expected {SOURCE_KINDS}")
    # A file:// URL is read as the path it holds: it can be hashed, and needs no fsspec.
    if is_url(path := without_file_protocol(source)):
        return open_remote(source, reading, seen)
    found = open_files(path, reading, seen)
    if found is None:
        raise UserError(
            f"no source {source[:LONGEST_QUOTE]!r}{did_you_mean(source)}: not a file, folder or named corpus; "
            f"expected {SOURCE_KINDS}"
        )
    return found
