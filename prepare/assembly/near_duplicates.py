"""Near duplicates in a corpus of any size, in bounded memory.

A document is left out if an earlier one is near: if of their MinHash signatures at least 80 % of
the values are equal, which estimates the Jaccard similarity of their sets of 5-word shingles. So
the first document of each cluster is kept, and the outcome depends on the documents and their order
alone.

Compared are documents that agree in one of 16 bands of 8 values: pairs of similarity s are found
with a probability of 1 - (1 - s**8)**16, 95 % at 0.8 and 99.6 % at 0.86. Records of band and
document are distributed over files by the band's hash, as `duplicates` does with documents.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prepare.unfinished.parts import Part, read_summary

# The similarity from which SlimPajama and Lee et al. 2022 count documents as near duplicates.
THRESHOLD = 0.8
BANDS = 16
# Of the documents that share a band, each is compared with the first and with so many before it.
# That is linear in a large cluster, where these are near too.
COMPARED_BEFORE = 8
# Records per file: 32 MB, and about 150 MB while they are sorted; as many files are open as there.
RECORDS_PER_FILE = 2_000_000
MAX_FILES = 256
# Pairs compared at a time: up to 64 MB of signatures.
PAIRS = 1 << 16
# Parts mapped at a time.
OPEN_PARTS = 128
# Of the near pairs so many are remembered, the ones with the earliest documents, and so many
# clusters of them reported, each with so many documents.
EXAMPLE_PAIRS, EXAMPLES = 256, 3
_RECORD = np.dtype([("band", "<u8"), ("document", "<i8")])
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)

Numbers = npt.NDArray[np.int64]


@dataclass
class NearDuplicates:
    """How many documents are left out; and of some that are kept the item and the position there,
    followed by those of the ones left out for them.
    """

    count: int
    clusters: list[list[tuple[int, int]]]


class Signatures:
    """Signatures by the number of the document in the corpus."""

    def __init__(self, parts: list[Path], dtype: np.dtype[Any]) -> None:
        self.parts = parts
        self.starts = np.array([*accumulate((read_summary(path).documents for path in parts), initial=0)])
        self.part = lru_cache(OPEN_PARTS)(lambda number: Part(parts[number], dtype))

    def document(self, number: int) -> tuple[int, int]:
        """Its item, and its position there."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        found = self.part(part)
        return found.summary.item, int(found.positions[number - self.starts[part]])

    def of(self, numbers: Numbers) -> npt.NDArray[np.uint32]:
        """(documents, values) of ascending numbers."""
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        edges = np.flatnonzero(np.diff(owners, prepend=-1, append=-1))
        return np.concatenate([
            self.part(int(owners[first])).signatures[numbers[first:stop] - self.starts[owners[first]]]
            for first, stop in pairwise(edges.tolist())
        ])  # fmt: skip


def mark_near_duplicates(
    parts: list[Path], dtype: np.dtype[Any], folder: Path, duplicates: Path | None
) -> tuple[Path, NearDuplicates]:
    """A file with one byte per document of the corpus: 1 if an earlier document is near, or if it is
    1 in `duplicates`, the file of the exact ones.
    """
    signatures = Signatures(parts, dtype)
    target, documents = duplicates or folder / "duplicates", int(signatures.starts[-1])
    # mmap(2) refuses 0 bytes
    marks = np.memmap(target, dtype=np.bool_, mode="r+" if duplicates else "w+", shape=(max(documents, 1),))
    bits = min((BANDS * len(marks) // RECORDS_PER_FILE).bit_length(), MAX_FILES.bit_length() - 1)
    files = [folder / f"bands_{number:03d}.partial" for number in range(1 << bits)]
    marked, pairs = int(marks.sum()), np.zeros((2, 0), np.int64)
    try:
        _distribute(signatures, marks, files, bits)
        for path in files:
            for earlier, later in _candidates(np.fromfile(path, dtype=_RECORD), marks):
                near = _are_near(signatures, earlier, later)
                marks[later[near]] = True
                pairs = _first_pairs(np.concatenate([pairs, [earlier[near], later[near]]], axis=1))
    finally:
        for path in files:
            path.unlink(missing_ok=True)
    clusters: dict[int, list[int]] = {}
    # A pair whose earlier document is left out itself is no example.
    for earlier, later in pairs[:, ~marks[pairs[0]]].T.tolist():
        clusters.setdefault(earlier, []).append(later)
    some = [[*map(signatures.document, [kept, *clusters[kept][:EXAMPLES]])] for kept in sorted(clusters)[:EXAMPLES]]
    marks.flush()
    return target, NearDuplicates(int(marks.sum()) - marked, some)


def band_hashes(signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """(documents, values) -> (documents, BANDS): equal where all values of a band are."""
    values = signatures.reshape(len(signatures), BANDS, -1).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), values.shape[:2])
    for row in range(values.shape[2]):
        hashes = (hashes ^ values[:, :, row]) * _FACTOR
        hashes = hashes ^ (hashes >> np.uint64(32))
    return hashes * _MIX


def _distribute(signatures: Signatures, marks: npt.NDArray[np.bool_], paths: list[Path], bits: int) -> None:
    """Append a record for each band of each document to the file that the hash's first bits number."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for number, start in enumerate(signatures.starts[:-1].tolist()):
            if not len(rows := signatures.part(number).signatures):
                continue
            # All ones: a document without words, which is like no other.
            chosen = np.flatnonzero(~marks[start : start + len(rows)] & (rows[:, 0] != 0xFFFFFFFF))
            records = np.empty(len(chosen) * BANDS, _RECORD)
            records["band"], records["document"] = band_hashes(rows[chosen]).ravel(), np.repeat(start + chosen, BANDS)
            # A shift by 64 is undefined in C, so a single file is a special case.
            owner = records["band"] >> np.uint64(64 - bits) if bits else np.zeros(len(records), np.uint64)
            order = np.argsort(owner, kind="stable")
            borders = np.searchsorted(owner[order], np.arange(1, len(files)))
            for file, chunk in zip(files, np.split(records[order], borders), strict=True):
                file.write(chunk.tobytes())


def _candidates(records: npt.NDArray[Any], marks: npt.NDArray[np.bool_]) -> Iterator[tuple[Numbers, Numbers]]:
    """(earlier, later) documents that share a band, up to `PAIRS` at a time, where the later one is
    not marked yet.
    """
    records = records[np.lexsort((records["document"], records["band"]))]
    bands, documents = records["band"], records["document"]
    at = np.arange(len(records))
    # For each record, where its band begins.
    first = np.maximum.accumulate(np.where(np.diff(bands, prepend=~bands[:1]) != 0, at, 0))
    for distance in (*range(1, COMPARED_BEFORE + 1), None):
        before = first if distance is None else at - distance
        later = np.flatnonzero((before >= first) & (at - before >= (distance or COMPARED_BEFORE + 1)))
        for begin in range(0, len(later), PAIRS):
            chunk = later[begin : begin + PAIRS]
            chunk = chunk[~marks[documents[chunk]]]
            if len(chunk):
                yield documents[before[chunk]], documents[chunk]


def _are_near(signatures: Signatures, earlier: Numbers, later: Numbers) -> npt.NDArray[np.bool_]:
    numbers, at = np.unique(np.concatenate([earlier, later]), return_inverse=True)
    values = signatures.of(numbers)
    near: npt.NDArray[np.bool_] = (values[at[: len(earlier)]] == values[at[len(earlier) :]]).mean(axis=1) >= THRESHOLD
    return near


def _first_pairs(pairs: Numbers) -> Numbers:
    """(2, pairs): those with the earliest later documents, each once."""
    return np.unique(pairs[::-1], axis=1)[::-1, :EXAMPLE_PAIRS]
