"""Documents of one split looked up among those of another, by content.

Every document gets a 64-bit key of its length and 16 of its ids, vectorized over a block of
documents: a key of every id would cost more than the rest of a pass over the shards. Documents with
equal keys are compared by a hash of their complete content.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.scan import Positions
from pipeline.files import hash_bytes
from pipeline.vocabulary.tokenizer import TokenIds

Keys = npt.NDArray[np.uint64]

KEY_IDS = 16
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses nothing


class Document(NamedTuple):
    """A document's position and length in its shard, in ids, without end-of-text."""

    file: str
    start: int
    length: int


class DocumentIndex:
    """The documents of a split: `add` all, `sort` once, then `find`. 40 bytes per document."""

    def __init__(self) -> None:
        self._ids: dict[str, TokenIds] = {}
        self._parts: list[tuple[str, Positions, Positions, Keys]] = []
        # For each key that was looked up, its documents by the hash of their content.
        self._by_content: dict[int, dict[str, Document]] = {}

    def add(self, file: str, ids: TokenIds, starts: Positions, lengths: Positions) -> None:
        """Add documents of a shard, whose `ids` stay mapped. Threads may add at the same time."""
        self._ids[file] = ids
        self._parts.append((file, starts, lengths, document_keys(ids, starts, lengths)))

    def sort(self) -> None:
        """Sort by key; documents with equal keys stay in the order of the files."""
        # Threads add parts in any order; sorted, the same document is reported at every start.
        self._parts.sort(key=lambda part: (part[0], part[1][0]))
        keys = [keys for *_, keys in self._parts]
        # A document's number counts through the parts, whose first numbers tell which part has it.
        self._part_starts = np.cumsum([0, *map(len, keys)])
        all_keys = np.concatenate([np.empty(0, np.uint64), *keys])
        self._numbers = np.argsort(all_keys, kind="stable")
        self._keys = all_keys[self._numbers]

    def find(self, ids: TokenIds, starts: Positions, lengths: Positions) -> Iterator[tuple[int, Document]]:
        """Starts of the documents that the index has too, each with the index's document."""
        keys = document_keys(ids, starts, lengths)
        # Between the two positions are the documents with an equal key, mostly none or one.
        first = np.searchsorted(self._keys, keys, side="left")
        beyond = np.searchsorted(self._keys, keys, side="right")
        for hit in np.flatnonzero(first < beyond):
            start, length = int(starts[hit]), int(lengths[hit])
            twin = self._group(int(first[hit]), int(beyond[hit])).get(hash_bytes(ids[start : start + length].tobytes()))
            if twin:
                yield start, twin

    def _group(self, first: int, beyond: int) -> dict[str, Document]:
        """The documents of one key by the hash of their content; of equal ones the first."""
        if first not in self._by_content:
            documents = [self._document(int(number)) for number in self._numbers[first:beyond]]
            self._by_content[first] = {
                hash_bytes(self._ids[file][start : start + length].tobytes()): Document(file, start, length)
                for file, start, length in reversed(documents)
            }
        return self._by_content[first]

    def _document(self, number: int) -> Document:
        part = int(np.searchsorted(self._part_starts, number, side="right")) - 1
        file, starts, lengths, _ = self._parts[part]
        at = number - int(self._part_starts[part])
        return Document(file, int(starts[at]), int(lengths[at]))


def document_keys(ids: TokenIds, starts: Positions, lengths: Positions) -> Keys:
    """A number for each document, equal for equal documents; none may be empty."""
    keys: Keys = lengths.astype(np.uint64)
    # Evenly spaced, from the first id to the last.
    for taken in range(KEY_IDS):
        keys = (keys + ids[starts + (lengths - 1) * taken // (KEY_IDS - 1)]) * _FACTOR
    return keys
