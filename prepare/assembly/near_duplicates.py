"""Near duplicates in a corpus of any size, in bounded memory.

A document is left out if an earlier one is near: if of their MinHash signatures at least 80 % of
the values are equal, which estimates the Jaccard similarity of their sets of 5-word shingles. So
the first document of each cluster is kept, and the outcome follows from the documents and their
order alone.

Compared are documents that agree in one of 16 bands of 8 values: pairs of similarity s are found
with a probability of 1 - (1 - s**8)**16, 95 % at 0.8 and 99.6 % at 0.86. Bands meet as the hashes
of `duplicates` do: distributed over files and sorted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prepare.assembly.duplicates import Marked, sorted_records
from prepare.assembly.splits import numbered_parts

# The similarity from which SlimPajama counts documents as near duplicates.
THRESHOLD = 0.8
BANDS = 16
# Of the documents that share a band, each is compared with the first and with so many before it:
# linear in a large cluster, where these are near too.
COMPARED_BEFORE = 8
# Pairs compared at a time: up to 64 MB of signatures.
PAIRS = 1 << 16
# Near pairs remembered for examples, those of the earliest documents; clusters reported, and
# documents left out of each.
EXAMPLE_PAIRS, EXAMPLES = 256, 3
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses nothing

Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.uint32]


def mark_near_duplicates(parts: list[Path], dtype: np.dtype[Any], folder: Path, exact: int | None) -> Marked:
    """Marks each document that an earlier one is near, next to the `exact` duplicates that
    `mark_duplicates` has marked; None if it has not been called.
    """
    documents = sum(part.summary.documents for part, _ in numbered_parts(parts, dtype))
    marked, path = folder / "duplicates", folder / "signatures.partial"
    marks = np.memmap(marked, np.bool_, "w+" if exact is None else "r+", shape=(documents,))
    pairs = np.zeros((2, 0), np.int64)
    try:
        # Next to each other, as they are compared in any order; 512 bytes a document.
        with path.open("wb") as file:
            for part, _ in numbered_parts(parts, dtype):
                file.write(part.signatures.data)
        signatures: Values = np.memmap(path, "<u4", "r").reshape(documents, -1)
        for records in sorted_records(_bands(signatures), documents * BANDS, folder):
            for earlier, later in _candidates(records["high"], records["number"] // BANDS, marks):
                near = (signatures[earlier] == signatures[later]).mean(axis=1) >= THRESHOLD
                marks[later[near]] = True
                found = np.concatenate([pairs, [earlier[near], later[near]]], axis=1)
                pairs = np.unique(found[::-1], axis=1)[::-1, :EXAMPLE_PAIRS]
    finally:
        path.unlink(missing_ok=True)
    clusters: dict[int, list[int]] = {}
    # A pair whose earlier document is left out itself is not an example, unless there is no other.
    kept_first = ~marks[pairs[0]]
    for kept, left_out in pairs[:, kept_first if kept_first.any() else slice(None)].T.tolist():
        clusters.setdefault(kept, [kept]).append(left_out)
    marks.flush()
    count = int(marks.sum()) - (exact or 0)
    return Marked(marked, count, [clusters[kept][: 1 + EXAMPLES] for kept in sorted(clusters)[:EXAMPLES]])


def _bands(signatures: Values) -> Iterator[npt.NDArray[np.uint64]]:
    """(documents * BANDS, 2) hashes, both halves equal, of a few documents at a time."""
    for first in range(0, len(signatures), PAIRS):
        values = signatures[first : first + PAIRS].reshape(-1, BANDS, signatures.shape[1] // BANDS)
        hashes = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), values.shape[:2])
        for row in range(values.shape[2]):
            hashes = (hashes ^ values[:, :, row]) * _FACTOR
            hashes = hashes ^ (hashes >> np.uint64(32))
        hashes = hashes * _FACTOR  # whose high bits, which choose a file, depend on all values
        yield np.repeat(hashes.reshape(-1, 1), 2, axis=1)


def _candidates(bands: Any, documents: Numbers, marks: npt.NDArray[np.bool_]) -> Iterator[tuple[Numbers, Numbers]]:
    """(earlier, later) documents that share a band, up to `PAIRS` at a time, where the later one is
    not marked yet.
    """
    at = np.arange(len(bands))
    # For each record, where its band begins.
    first = np.maximum.accumulate(np.where(np.diff(bands, prepend=~bands[:1]) != 0, at, 0))
    for distance in range(COMPARED_BEFORE + 1):
        before = at - distance if distance else first
        later = np.flatnonzero((first <= before) & (before < at))
        for begin in range(0, len(later), PAIRS):
            chunk = later[begin : begin + PAIRS]
            chunk = chunk[~marks[documents[chunk]]]
            yield documents[before[chunk]], documents[chunk]
