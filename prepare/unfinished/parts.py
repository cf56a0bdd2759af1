"""What a preparation has done so far: a file for each finished unit, so that the folder they lie in is the journal.

A part holds a unit's documents in their order, of both splits:

    token ids, each document ended by end-of-text
    int64 for each document: its tokens
    int64 for each document: its bytes of text
    16 bytes for each document: XXH3-128 of its text, seeded
    JSON: the `Summary`
    int64: the length of that JSON

It is written beside and renamed, so a part that is there is whole, and doing a unit twice gives the same bytes.
"""

import mmap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from pipeline.files import publish
from pipeline.vocabulary.tokenizer import TokenIds

# By reason: how many, and where the first one is.
Reports = dict[str, dict[str, Any]]

_INT64 = np.dtype("<i8")
# Ids are written so many at a time: document by document was a sixth of all time.
TOKENS_AT_ONCE = 1 << 18


def report(reports: Reports, reason: str, example: str, count: int = 1) -> None:
    """Count `reason` once more; the first example stays."""
    entry = reports.setdefault(reason, {"count": 0, "example": example})
    entry["count"] += count


def add_reports(reports: Reports, more: Reports) -> None:
    for reason, entry in more.items():
        report(reports, reason, entry["example"], entry["count"])


@dataclass
class Summary:
    """What is in a part. `last` marks the last unit of an item; `engine` is who encoded it."""

    item: int
    unit: int
    last: bool
    engine: str
    size: int
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: Reports = field(default_factory=dict)
    unusual: Reports = field(default_factory=dict)


def part_name(item: int, unit: int) -> str:
    return f"{item:06d}_{unit:06d}.part"


class PartWriter:
    """Writes one part; nothing of it is there before `close`."""

    def __init__(self, path: Path, dtype: np.dtype[Any], end_of_text: int) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._file = self._partial.open("wb")
        self._dtype = dtype
        self._end = np.array([end_of_text], dtype=dtype)
        self._waiting: list[TokenIds] = []
        self._lengths: list[int] = []
        self._text_bytes: list[int] = []
        self._hashes = bytearray()
        self._tokens = self._begin = self._written = 0

    def add(self, ids: TokenIds) -> None:
        """More ids of the present document, of any width."""
        self._waiting.append(ids)
        self._tokens += len(ids)
        if self._tokens - self._written >= TOKENS_AT_ONCE:
            self._write()

    def end_document(self, text_bytes: int, digest: bytes) -> None:
        self.add(self._end)
        self._lengths.append(self._tokens - self._begin)
        self._text_bytes.append(text_bytes)
        self._hashes += digest
        self._begin = self._tokens

    def abandon_document(self) -> None:
        """Forget the ids of the present document."""
        self._write()
        self._file.seek(self._begin * self._dtype.itemsize)
        self._file.truncate()
        self._tokens = self._written = self._begin

    def _write(self) -> None:
        if self._waiting:
            self._file.write(np.concatenate(self._waiting, dtype=self._dtype, casting="unsafe").data)
            self._waiting, self._written = [], self._tokens

    def close(self, summary: Summary) -> Summary:
        summary.documents, summary.tokens, summary.bytes = len(self._lengths), self._tokens, sum(self._text_bytes)
        self._write()
        for numbers in (self._lengths, self._text_bytes):
            self._file.write(np.array(numbers, dtype=_INT64).data)
        self._file.write(self._hashes)
        footer = orjson.dumps(asdict(summary))
        self._file.write(footer + len(footer).to_bytes(8, "little"))
        self._file.close()
        publish(self._partial, self.path)
        return summary

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class Part:
    """A part that is read back; its arrays are memory-mapped."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.summary = read_summary(path)
        documents = self.summary.documents
        at = self.summary.tokens * dtype.itemsize
        self.tokens: TokenIds = _map(path, dtype, 0, self.summary.tokens)
        self.lengths: npt.NDArray[np.int64] = _map(path, _INT64, at, documents)
        at += documents * _INT64.itemsize
        self.text_bytes: npt.NDArray[np.int64] = _map(path, _INT64, at, documents)
        at += documents * _INT64.itemsize
        self.hashes: npt.NDArray[np.uint64] = _map(path, np.dtype(">u8"), at, 2 * documents).reshape(documents, 2)

    def let_go(self) -> None:
        """Of the ids in memory; they are read again if asked for. A document may be larger than what memory should hold."""
        if isinstance(self.tokens, np.memmap):
            self.tokens._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def read_summary(path: Path) -> Summary:
    with path.open("rb") as file:
        end = file.seek(-8, 2)
        length = int.from_bytes(file.read(8), "little")
        file.seek(end - length)
        return Summary(**orjson.loads(file.read(length)))


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Any:
    if count == 0:  # an empty file range cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
