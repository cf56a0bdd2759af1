"""Exact duplicates in a corpus of any size, in bounded memory.

Documents are equal if the 128 bits of their hashes are. The hashes are distributed over files by
their first bits, so equal ones meet in the same file, and each file is small enough to be sorted in
memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prepare.assembly.splits import DocumentRange, numbered_parts
from prepare.unfinished.parts import Part
from prepare.units import Item

# Records per file: 48 MB, and about 150 MB while they are sorted.
RECORDS_PER_FILE = 2_000_000
# Beyond 256 * 2 M = 512 M documents the files get larger instead: all are open at a time, and 1,024
# is the usual limit.
MAX_FILES = 256
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])


def mark_duplicates(hashes: Iterable[npt.NDArray[np.uint64]], documents: int, folder: Path) -> Path:
    """A file with one byte per document of the corpus: 1 if an earlier document has the same text.

    `hashes` yields the two halves of the documents' XXH3-128 in corpus order, as (n, 2) arrays.
    """
    target = folder / "duplicates"
    marks = np.memmap(target, dtype=np.bool_, mode="w+", shape=(max(documents, 1),))  # mmap(2) refuses 0 bytes
    for records in sorted_records(hashes, documents, folder):
        # Of neighbours with the same hash all but the first are duplicates.
        same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
        marks[records["number"][1:][same]] = True
    marks.flush()
    return target


def sorted_records(
    hashes: Iterable[npt.NDArray[np.uint64]], count: int, folder: Path
) -> Iterator[npt.NDArray[np.void]]:
    """Records of hash (`high` and `low` half) and `number`, in groups that share no hash, sorted by
    hash, then by number.

    `hashes` yields both halves of `count` hashes, which are numbered from 0, as (n, 2) arrays.
    """
    bits = min((count // RECORDS_PER_FILE).bit_length(), MAX_FILES.bit_length() - 1)
    files = [folder / f"hashes_{number:03d}.partial" for number in range(1 << bits)]
    try:
        _distribute(hashes, files, bits)
        for path in files:
            records = np.fromfile(path, dtype=_RECORD)
            yield records[np.lexsort((records["number"], records["low"], records["high"]))]
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _distribute(hashes: Iterable[npt.NDArray[np.uint64]], paths: list[Path], bits: int) -> None:
    """Append a record for each hash to the file that the first `bits` of its hash number."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        first = 0
        for halves in hashes:
            records = np.empty(len(halves), _RECORD)
            records["high"], records["low"] = halves[:, 0], halves[:, 1]
            records["number"] = np.arange(first, first + len(halves))
            first += len(halves)
            # A shift by 64 is undefined in C, so a single file is a special case.
            file_of = records["high"] >> np.uint64(64 - bits) if bits else np.zeros(len(halves), np.uint64)
            order = np.argsort(file_of, kind="stable")
            borders = np.searchsorted(file_of[order], np.arange(1, len(files)))
            for file, chunk in zip(files, np.split(records[order], borders), strict=True):
                file.write(chunk.tobytes())


def locate(number: int, parts: list[Path], dtype: np.dtype[Any], items: Sequence[Item]) -> str:
    """Where document `number` of the corpus is."""
    part, all_of_it = _part_of(number, parts, dtype)
    return items[part.summary.item].locate(int(part.positions[number - all_of_it.number]))


def locate_duplicate(number: int, parts: list[Path], dtype: np.dtype[Any], items: Sequence[Item]) -> str:
    """Where document `number` of the corpus is, and which earlier document has its text."""
    part, all_of_it = _part_of(number, parts, dtype)
    digest = part.hashes[number - all_of_it.number]
    first = next(
        documents.number + at
        for part, documents in numbered_parts(parts, dtype)
        for at in np.flatnonzero((part.hashes == digest).all(axis=1))[:1].tolist()
    )
    return f"{locate(number, parts, dtype, items)}, the same as {locate(first, parts, dtype, items)}"


def _part_of(number: int, parts: list[Path], dtype: np.dtype[Any]) -> tuple[Part, DocumentRange]:
    return next(each for each in numbered_parts(parts, dtype) if number < each[1].number + each[1].stop)
