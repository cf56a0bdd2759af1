"""Exact duplicates of a corpus, in memory that does not follow its size.

Documents are equal where the 128 bits of their hash are. Their hashes are dealt into files by the first bits, so equal
ones meet in one file, and each file is small enough to be sorted in memory.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A file of so many is sorted in about 150 MB.
DOCUMENTS_AT_ONCE = 2_000_000
MOST_FILES = 256
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])


def mark_duplicates(hashes: Iterable[npt.NDArray[np.uint64]], documents: int, folder: Path) -> Path:
    """A file with a byte for each document of the corpus: 1 where an earlier document has the same text.

    `hashes` gives the documents' halves of XXH3-128 in the corpus's order, some (n, 2) at a time.
    """
    target = folder / "duplicates"
    target.write_bytes(b"")
    with target.open("r+b") as file:
        file.truncate(max(documents, 1))
    marks = np.memmap(target, dtype=np.bool_, mode="r+")
    bits = min((documents // DOCUMENTS_AT_ONCE).bit_length(), MOST_FILES.bit_length() - 1)
    files = [folder / f"hashes_{number:03d}.partial" for number in range(1 << bits)]
    try:
        _deal(hashes, files, bits)
        for path in files:
            _mark(np.fromfile(path, dtype=_RECORD), marks)
    finally:
        for path in files:
            path.unlink(missing_ok=True)
    marks.flush()
    return target


def _deal(hashes: Iterable[npt.NDArray[np.uint64]], paths: list[Path], bits: int) -> None:
    files = [path.open("wb") for path in paths]
    try:
        document = 0
        for some in hashes:
            records = np.empty(len(some), _RECORD)
            records["high"], records["low"] = some[:, 0], some[:, 1]
            records["document"] = np.arange(document, document + len(some))
            document += len(some)
            number = records["high"] >> np.uint64(64 - bits) if bits else np.zeros(len(some), np.uint64)
            order = np.argsort(number, kind="stable")
            borders = np.searchsorted(number[order], np.arange(1, len(files)))
            for file, its in zip(files, np.split(records[order], borders), strict=True):
                file.write(its.tobytes())
    finally:
        for file in files:
            file.close()


def _mark(records: npt.NDArray[Any], marks: npt.NDArray[np.bool_]) -> None:
    order = np.lexsort((records["document"], records["low"], records["high"]))
    records = records[order]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    marks[records["document"][1:][same]] = True
