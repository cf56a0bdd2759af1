"""Parts: one file for each finished unit, so their folder is itself the record of what is done.

Two words that are easily mixed up: a *part* is the file of a finished unit, a *piece*
(`encoding/pieces.py`) is a slice of one long document. A part holds the documents of its unit in
order, train and val alike:

    token ids, each document followed by end-of-text
    int64 per document: its tokens
    int64 per document: its bytes of text
    16 bytes per document: XXH3-128 of its text, seeded
    int64 per document: its position in the item
    512 bytes per document: its MinHash signature; nothing without --near-dedup
    JSON lines: contaminated documents that were left out
    JSON: the `Summary`
    int64: the length of that JSON

A part is written under another name and then renamed, so one that exists is complete; encoding a
unit twice gives the same bytes.
"""

import mmap
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.files import dump_json, parse_json, sync, unique
from pipeline.vocabulary.tokenizer import TokenIds

# Reason -> how many documents (`count`) and where the first one is (`example`); of broken rows also
# `broken` (true) and the positions of the first ones (`first`).
Reports = dict[str, dict[str, Any]]

FIRST_BROKEN = 3
# Token ids buffered before a write: writing document by document took a sixth of the run time.
WRITE_TOKENS = 1 << 18


def report(reports: Reports, reason: str, example: str, *, count: int = 1, first: Sequence[str] = ()) -> None:
    """Add `count` documents to `reason`; the example of the first report is kept.

    `first` is given for broken rows: the positions of the first ones.
    """
    entry = reports.setdefault(reason, {"count": 0, "example": example})
    entry["count"] += count
    if first:
        entry |= {"broken": True, "first": [*entry.get("first", ()), *first][:FIRST_BROKEN]}


def merge_reports(several: Iterable[Reports]) -> Reports:
    """One report of several, in the order of the reasons."""
    merged: Reports = {}
    for reports in several:
        for reason, entry in reports.items():
            report(merged, reason, entry["example"], count=entry["count"], first=entry.get("first", ()))
    return dict(sorted(merged.items()))


@dataclass
class Summary:
    """What a part holds.

    `item` is the key of its item; `last` marks the last unit of it; `engine` is the name of the
    encoder that made it; `rows` are all documents that were read, `documents` those that were kept;
    `signature_bytes` and `listed_bytes` are those of all documents.
    """

    item: str
    unit: int
    last: bool
    engine: str
    size: int
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    signature_bytes: int = 0
    listed_bytes: int = 0
    skipped: Reports = field(default_factory=dict)
    unusual: Reports = field(default_factory=dict)


def part_name(item: str, unit: int, first: int | None = None) -> str:
    """With `first`, of a second part that holds only so many documents of the unit, up to a limit."""
    return f"{item}_{unit:06d}.part" if first is None else f"{item}_{unit:06d}.first_{first}"


class PartWriter:
    """Writes one part, which appears under its name only when `close` is called."""

    def __init__(self, path: Path, dtype: np.dtype[Any], end_of_text: int) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.{unique()}.partial")
        self._file = self._partial.open("wb")
        self._dtype = dtype
        self._end = np.array([end_of_text], dtype=dtype)
        self._buffer: list[TokenIds] = []
        # int64 in the byte order of the machine: little-endian, as on all that run PyTorch on GPUs.
        self._lengths, self._text_bytes, self._positions = array("q"), array("q"), array("q")
        self._hashes, self._signatures, self._listed = bytearray(), bytearray(), bytearray()
        # Tokens so far: of all documents, up to the current document, and already in the file.
        self._tokens = self._begin = self._written = 0

    def begin_document(self, position: int) -> None:
        self._position = position

    def add(self, ids: TokenIds) -> None:
        """Append ids, of any integer width, to the current document."""
        self._buffer.append(ids)
        self._tokens += len(ids)
        if self._tokens - self._written >= WRITE_TOKENS:
            self._flush()

    def end_document(self, text_bytes: int, digest: bytes, signature: bytes = b"") -> None:
        self.add(self._end)
        self._positions.append(self._position)
        self._lengths.append(self._tokens - self._begin)
        self._text_bytes.append(text_bytes)
        self._hashes += digest
        self._signatures += signature
        self._begin = self._tokens

    def list_left_out(self, **entry: str) -> None:
        self._listed += dump_json(entry) + b"\n"

    def abandon_document(self) -> None:
        """Drop the ids of the current document."""
        # Some of them may be in the file already, together with ids of documents before: write all,
        # then truncate.
        self._flush()
        self._file.seek(self._begin * self._dtype.itemsize)
        self._file.truncate()
        self._tokens = self._written = self._begin

    def _flush(self) -> None:
        if self._buffer:
            # The libraries give uint32 whatever the vocabulary; every id fits the part's dtype.
            self._file.write(np.concatenate(self._buffer, dtype=self._dtype, casting="unsafe").data)
            self._buffer, self._written = [], self._tokens

    def close(self, summary: Summary) -> Summary:
        """Write what is left and publish the part; returns `summary` with its counts filled in."""
        summary.documents, summary.tokens, summary.bytes = len(self._lengths), self._tokens, sum(self._text_bytes)
        self._flush()
        summary.signature_bytes, summary.listed_bytes = len(self._signatures), len(self._listed)
        for column in (
            self._lengths, self._text_bytes, self._hashes, self._positions, self._signatures, self._listed,
        ):  # fmt: skip
            self._file.write(column)
        footer = dump_json(asdict(summary))
        self._file.write(footer + len(footer).to_bytes(8, "little"))
        self._file.close()
        # Its content is durable before its name is. The name itself need not be: a part whose rename is
        # lost with the power is encoded again, and syncing the folder took as long as the part.
        sync(self._partial)
        self._partial.rename(self.path)
        return summary

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class Part:
    """A finished part, read through a memory map.

    `tokens` is (tokens,), `lengths`, `text_bytes` and `positions` are (documents,), `hashes` is
    (documents, 2): high and low half. `signatures` is (documents, values), `listed` JSON lines.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.summary = read_summary(path)
        documents, values, offset = self.summary.documents, self.summary.signature_bytes // 4, 0
        # One map for all: np.memmap per array took 4 ms a part.
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        def following(dtype: npt.DTypeLike, count: int, columns: int = 1) -> Any:
            nonlocal offset
            found = np.frombuffer(self._map, dtype, count, offset)
            offset += found.nbytes
            return found if columns == 1 else found.reshape(-1, columns)

        # In the order in which `PartWriter.close` writes them.
        self.tokens: TokenIds = following(dtype, self.summary.tokens)
        self.lengths: npt.NDArray[np.int64] = following("<i8", documents)
        self.text_bytes: npt.NDArray[np.int64] = following("<i8", documents)
        # XXH3 digests are big-endian, so the first half is the high one.
        self.hashes: npt.NDArray[np.uint64] = following(">u8", 2 * documents, columns=2)
        self.positions: npt.NDArray[np.int64] = following("<i8", documents)
        self.signatures: npt.NDArray[np.uint32] = following("<u4", values, columns=max(values // max(documents, 1), 1))
        self.listed: npt.NDArray[np.uint8] = following("u1", self.summary.listed_bytes)

    def release_memory(self) -> None:
        """Let the kernel drop the ids that were read: there may be more of them than memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Wanted:
    """Counts documents from the beginning of the corpus up to a limit: with `distinct`, the dtype of
    the parts' ids, each text once.
    """

    def __init__(self, limit: int | None, distinct: np.dtype[Any] | None) -> None:
        self._limit, self._dtype = limit, distinct
        self._documents = 0
        # 64 of the 128 bits: of 10 M documents two meet with a chance of 3 in a million. They take
        # 60 bytes each, and only up to the limit.
        self._seen: set[int] = set()

    def is_full(self) -> bool:
        return self._limit is not None and max(self._documents, len(self._seen)) >= self._limit

    def take(self, path: Path, documents: int) -> int:
        """How many of the documents of the next part are wanted."""
        if self._limit is None:
            return documents
        if self._dtype is None:
            taken = min(documents, self._limit - self._documents)
            self._documents += taken
            return taken
        for number, digest in enumerate(Part(path, self._dtype).hashes[:, 0].tolist()):
            if self.is_full():
                return number
            self._seen.add(digest)
        return documents


def read_summary(path: Path) -> Summary:
    with path.open("rb") as file:
        end = file.seek(-8, 2)
        length = int.from_bytes(file.read(8), "little")
        file.seek(end - length)
        return Summary(**parse_json(file.read(length)))
