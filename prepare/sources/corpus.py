"""Where text comes from: a corpus is one or more sources, named by the user; each becomes small
units of work.

The parent only lists them, in the corpus's order; a unit reads itself in the process that encodes
it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import hash_bytes
from prepare.documents.fields import NOT_TEXT
from prepare.sources.hub import open_hub
from prepare.sources.items import Source, keyed_items, units_with_fields, usual_text_bytes
from prepare.sources.local import Files, Stdin, open_files, open_shakespeare, open_stdlib
from prepare.sources.names import SOURCE_KINDS, did_you_mean, hub_source, without_file_protocol
from prepare.sources.remote import RemoteFiles, open_remote
from prepare.storage.files import StoredFile, is_url, shown
from prepare.units import MISSING, NULL, STDIN_SPOOL, Item, Reading, Refused, unit_bytes

# Of a source that does not exist: it may be a text that someone forgot to write to a file.
LONGEST_QUOTE = 200


@dataclass(frozen=True)
class Corpus:
    """All sources of one dataset, in the order given; `typed` is how the user named them."""

    typed: list[str]
    sources: list[Source]

    @cached_property
    def stored(self) -> list[list[StoredFile]]:
        """The files of each source when they were first asked for."""
        return [source.stored() for source in self.sources]

    def items(self) -> list[Item]:
        """All of it, in units as its size asks for."""
        return [item for _, item in Snapshot(self, unit_bytes(self.file_bytes() or 0), lambda file: file)]

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]

    def file_bytes(self) -> int | None:
        """Bytes of all source files; None if one of them is a stream."""
        if any(source.is_stream for source in self.sources):
            return None
        return sum(file.size for files in self.stored for file in files)

    def check_split(self, split: str) -> None:
        """Raises UserError for a split that no source has a choice of."""
        if split != Reading.split and not any(source.has_splits for source in self.sources):
            raise UserError(f"--split {split} has no effect: no source is a dataset of the Hub or a folder with splits")

    def check_field(self) -> None:
        """Raises UserError if no row has the text field, which costs a look at every row.

        Otherwise it ends at the first row that has it: some rows without it are usual.
        """
        fault = ""
        for unit in (unit for item in self.items() for unit in units_with_fields(item)):
            for position, document in unit.documents():
                if not isinstance(document, Refused) or document.reason in (NULL, NOT_TEXT):
                    return
                if document.reason == MISSING and not fault:
                    fault = f"{unit.locate(position)}: {document.detail}"
        if fault:
            name = self.sources[0].reading.text_field
            raise UserError(f"no field {name!r} in any row, as in {fault}; choose one with --text-field")

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [entry for source in self.sources for entry in source.record(hash_of)]


class Snapshot:
    """The corpus as it was listed at one moment: its files, and, in order, its items with their keys.

    `as_known` replaces a local file by an earlier record of the same content, which was only touched.
    """

    def __init__(self, corpus: Corpus, unit_bytes: int, as_known: Callable[[StoredFile], StoredFile]) -> None:
        self.corpus, self._unit_bytes = corpus, unit_bytes
        self._files = [
            list(map(as_known, files)) if isinstance(source, Files) else files
            for source, files in zip(corpus.sources, corpus.stored, strict=True)
        ]
        self.files = [file for files in self._files for file in files]
        # Each key that was listed so far, and the number of its source.
        self.keys: list[tuple[str, int]] = []
        # Of the files that were listed completely so far and of the items until then; of all items so far.
        self._file_bytes = self._text_bytes = self._item_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        """File by file, as the footer of a Parquet file may lie behind a network."""
        self._file_bytes = self._text_bytes = self._item_bytes = position = 0
        times: Counter[str] = Counter()
        for number, (source, files) in enumerate(zip(self.corpus.sources, self._files, strict=True)):
            for key, item in keyed_items(self._counted(source.ready(files)), source, self._unit_bytes):
                # A source may be given twice; its text is then wanted twice.
                times[key] += 1
                unique = key if times[key] == 1 else hash_bytes(f"{key} {times[key]}".encode())
                if position == len(self.keys):  # else it was listed before
                    self.keys.append((unique, number))
                position += 1
                self._item_bytes += item.size
                yield unique, item

    def text_bytes(self) -> int:
        """Bytes of text, as near as they are known before reading: in proportion to those listed so far."""
        if not self._text_bytes:
            return sum(map(usual_text_bytes, self.files))
        return sum(file.size for file in self.files) * self._text_bytes // self._file_bytes

    def _counted(self, files: Iterator[StoredFile]) -> Iterator[StoredFile]:
        for file in files:
            yield file
            # Only now: of a file that is half listed, the items would stand against nothing.
            self._file_bytes, self._text_bytes = self._file_bytes + file.size, self._item_bytes


def open_corpus(sources: list[str], reading: Reading, folder: Path, earlier: Corpus | None = None) -> Corpus:
    """Resolve what the user typed; `folder` keeps a copy of stdin.

    With an `earlier` opening, only what may have changed since then is looked up again. Raises
    UserError for what does not exist.
    """
    if not all(sources) or not sources:  # an unset shell variable gives an empty one: not the working folder
        raise UserError(f"no source given: expected {SOURCE_KINDS}")
    if sources.count("-") > 1:
        raise UserError("stdin (-) is given twice as a source: it can be read only once")
    before, seen = earlier.sources if earlier else [None] * len(sources), set[str]()
    return Corpus(
        sources,
        [
            known
            if known and not isinstance(known, Files | RemoteFiles)
            else _open_source(source, reading, folder, seen)
            for source, known in zip(sources, before, strict=True)
        ],
    )


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
