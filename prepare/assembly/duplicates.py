"""Exact duplicates in a corpus of any size, in bounded memory.

Documents are equal if the 128 bits of their hashes are. The hashes are distributed over files by
their first bits, so equal ones meet in the same file, and each file is small enough to be sorted in
memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prepare.assembly.splits import numbered_parts
from prepare.documents.lines import Lines
from prepare.storage.files import blocks
from prepare.units import POSITION_BITS, Batch, Item, Unit

# Records per file: 48 MB, and about 150 MB while they are sorted.
RECORDS_PER_FILE = 2_000_000
# Beyond 256 * 2 M = 512 M documents the files get larger instead: all are open at a time, and 1,024
# is the usual limit.
MAX_FILES = 256
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])


@dataclass(frozen=True)
class Marked:
    """Documents of the corpus that are left out.

    `path` is a file with one byte per document: 1 if it is left out, whatever for. `count` of them
    were found here. `clusters` are examples: the number of a document that is kept, and those of
    some that are left out for it.
    """

    path: Path
    count: int
    clusters: list[list[int]]


def mark_duplicates(hashes: Iterable[npt.NDArray[np.uint64]], documents: int, folder: Path) -> Marked:
    """Marks each document whose text an earlier one has.

    `hashes` yields the two halves of the documents' XXH3-128 in corpus order, as (n, 2) arrays.
    """
    path, count, example = folder / "duplicates", 0, [documents, documents]
    marks = np.memmap(path, dtype=np.bool_, mode="w+", shape=(max(documents, 1),))  # mmap(2) refuses 0 bytes
    for records in sorted_records(hashes, documents, folder):
        # Of neighbours with the same hash all but the first are duplicates.
        same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
        later = records["number"][1:][same]
        marks[later] = True
        count += len(later)
        if len(later) and later.min() < example[1]:
            # The neighbour before the first duplicate is none.
            example = [int(records["number"][:-1][same][later.argmin()]), int(later.min())]
    marks.flush()
    return Marked(path, count, [example] if count else [])


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


def locate(
    clusters: list[list[int]], parts: list[Path], dtype: np.dtype[Any], items: Iterable[tuple[str, Item]]
) -> list[list[str]]:
    """Where the documents of each cluster are. `items` are the corpus's by the keys of their parts."""
    positions = {
        number: (part.summary.item, int(part.positions[number - documents.number]))
        for part, documents in numbered_parts(parts, dtype)
        for number in chain.from_iterable(clusters)
        if documents.number <= number < documents.number + documents.stop
    }
    wanted = {key for key, _ in positions.values()}
    found = {key: item for key, item in items if key in wanted}
    names = {number: _locate(found[key], position) for number, (key, position) in positions.items()}
    return [[names[number] for number in cluster] for cluster in clusters]


def _locate(unit: Unit | Item, position: int) -> str:
    """With its line, where lines are documents: units know bytes, editors know lines."""
    if isinstance(unit, Batch):
        return _locate(unit.items[position >> POSITION_BITS], position & ((1 << POSITION_BITS) - 1))
    where = unit.locate(position)
    if isinstance(unit, Lines):
        where += f" (line {1 + sum(block.count(10) for block in blocks(unit.path, 0, position))})"
    return where
