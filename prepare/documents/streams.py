"""Files that have to be read in order: packed JSONL, and JSON. The parent cuts them, workers make texts of the pieces.

Each piece is at most a few MB of whole lines or values, not yet parsed. A single longer one goes into a file of the
dataset's spool folder, which `release` or the end of the preparation removes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare.documents.jsontext import Cursor, Malformed, each_value, not_json, parse, parse_long
from prepare.storage.compressed import text_blocks
from prepare.storage.files import shown
from prepare.units import LONG_BYTES, Document, spool_file

PIECE_BYTES = 4 << 20


class _InStream:
    """What a stream gives is found by its byte in the unpacked text."""

    path: str

    def place(self, position: int) -> str:
        return f"{shown(self.path)} at byte {position} of its text"


@dataclass(frozen=True)
class Values(_InStream):
    """JSON values and their places in the unpacked file."""

    path: str
    text_field: str
    values: tuple[tuple[int, bytes], ...]

    @property
    def size(self) -> int:
        return sum(len(value) for _, value in self.values)

    def documents(self) -> Iterator[tuple[int, Document]]:
        for at, value in self.values:
            yield at, parse(value, self.text_field, lambda at=at: self.place(at))  # type: ignore[misc]


@dataclass(frozen=True)
class JsonLines(_InStream):
    """Whole lines of JSONL, of which the first is line `number` and begins at byte `begin` of the unpacked file."""

    path: str
    text_field: str
    content: bytes
    begin: int
    number: int

    @property
    def size(self) -> int:
        return len(self.content)

    def documents(self) -> Iterator[tuple[int, Document]]:
        at = self.begin
        for number, line in enumerate(self.content.split(b"\n"), start=self.number):
            if line.strip():
                yield at, parse(line, self.text_field, lambda number=number: f"{shown(self.path)} line {number}")  # type: ignore[misc]
            at += len(line) + 1


@dataclass(frozen=True)
class SpooledValue(_InStream):
    """One long JSON value, kept in a file; it stood at byte `begin` of the unpacked `path`, in JSONL in line `number`."""

    path: str
    text_field: str
    spooled: str
    begin: int
    number: int | None
    size: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        yield self.begin, parse_long(self.spooled, 0, self.size, self.text_field, self._words)

    def _words(self) -> str:
        return f"{shown(self.path)} line {self.number}" if self.number else self.place(self.begin)


Piece = Values | JsonLines | SpooledValue


@dataclass(frozen=True)
class Stream(_InStream):
    """A file of JSONL (`lines`) or of JSON values, which the parent cuts into pieces. `spool` is a folder."""

    path: str
    lines: bool
    text_field: str
    spool: str
    size: int

    def units(self) -> Iterator[Piece]:
        return self._cut_lines() if self.lines else self._cut_values()

    def _cut_lines(self) -> Iterator[JsonLines | SpooledValue]:
        held = bytearray()
        begin, number = 0, 1
        long: _Gathered | None = None
        for block in text_blocks(self.path):
            if long is not None:
                line, end, block = block.partition(b"\n")
                long.add(line)
                if not end:
                    continue
                yield self._spooled(long, begin, number)
                begin, number, long = begin + long.size + 1, number + 1, None
            held += block
            if len(held) < PIECE_BYTES:
                continue
            if cut := held.rfind(b"\n") + 1:
                yield JsonLines(self.path, self.text_field, bytes(held[:cut]), begin, number)
                begin, number = begin + cut, number + held.count(b"\n", 0, cut)
                del held[:cut]
            if len(held) > LONG_BYTES:
                long = self._gather()
                long.add(bytes(held))
                held.clear()
        if long is not None:
            yield self._spooled(long, begin, number)
        if held:
            yield JsonLines(self.path, self.text_field, bytes(held), begin, number)

    def _cut_values(self) -> Iterator[Values | SpooledValue]:
        cursor = Cursor(text_blocks(self.path))
        values: list[tuple[int, bytes]] = []
        size = 0
        try:
            for _ in each_value(cursor):
                begin = cursor.at
                found = self._gather()
                cursor.keeping(found.add, cursor.value)
                if values and (found.long or size + found.size > PIECE_BYTES):
                    yield Values(self.path, self.text_field, tuple(values))
                    values, size = [], 0
                if found.long:
                    yield self._spooled(found, begin)
                else:
                    values.append((begin, found.content()))
                    size += found.size
        except Malformed as error:
            raise not_json(shown(self.path), self.text_field, str(error)) from None
        if values:
            yield Values(self.path, self.text_field, tuple(values))

    def _gather(self) -> "_Gathered":
        return _Gathered(Path(self.spool))

    def _spooled(self, found: "_Gathered", begin: int, number: int | None = None) -> SpooledValue:
        return SpooledValue(self.path, self.text_field, found.spooled(), begin, number, found.size)


class _Gathered:
    """The pieces of one value; beyond LONG_BYTES they go into a file of the folder `spool`."""

    def __init__(self, spool: Path) -> None:
        self._spool, self.size = spool, 0
        self._held = bytearray()
        self._file: Any = None

    @property
    def long(self) -> bool:
        return self._file is not None

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._held += piece
        if self.size > LONG_BYTES:
            self._file = self._file or spool_file(self._spool)
            self._file.write(self._held)
            self._held.clear()

    def content(self) -> bytes:
        return bytes(self._held)

    def spooled(self) -> str:
        self._file.close()
        return str(self._file.name)
