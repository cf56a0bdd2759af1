"""Which document belongs to train and which to val."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer, token_dtype
from prepare.unfinished.parts import Part

HASH_RANGE = 1 << 64
# Tokens copied, hashed and counted at a time: 2 to 4 MB, which stay in the processor's cache from
# one step to the next.
COPY_TOKENS = 1 << 20

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SplitByHash:
    """val has the documents whose hash (the high half of XXH3-128, seeded) is below `threshold`.

    The rule looks at nothing but the content: exact duplicates stay together, and added documents
    move no others.
    """

    fraction: float
    threshold: int

    def chosen(self, split: str, hashes: npt.NDArray[np.uint64]) -> Flags:
        """(documents, 2) hashes -> (documents,): which documents have tokens in the split."""
        val: Flags = hashes[:, 0] < np.uint64(self.threshold)
        return val if split == "val" else ~val

    def token_ranges(self, split: str, lengths: npt.NDArray[np.int64], chosen: Flags) -> list[tuple[int, int]]:
        """Where in a part the tokens of the chosen documents are, as [start, stop).

        `lengths` are the tokens of all documents in the part up to the last one of those that
        `chosen` is about.
        """
        starts = np.concatenate([[0], np.cumsum(lengths)])[len(lengths) - len(chosen) :]
        # Neighbours that are chosen make one range: a range begins and ends where the flag changes.
        edges = starts[np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))]
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def text_bytes(self, split: str, total: int) -> int:
        """The bytes of text in the split, of `total` in the chosen documents."""
        return total

    def record(self) -> dict[str, Any]:
        """The rule as the manifest describes it."""
        described = {"kind": "hash", "fraction": self.fraction, "threshold": self.threshold}
        return {**described, "hash": "xxh3_128, high half, seeded"}


@dataclass(frozen=True)
class SplitByPosition:
    """The only document of a corpus is divided before its token `position`; val has the tail.

    The head has `head_bytes` of text. Both halves end with end-of-text, as documents do.
    """

    fraction: float
    position: int
    head_bytes: int

    def chosen(self, split: str, hashes: npt.NDArray[np.uint64]) -> Flags:
        return np.ones(len(hashes), np.bool_)

    def token_ranges(self, split: str, lengths: npt.NDArray[np.int64], chosen: Flags) -> list[tuple[int, int]]:
        end = int(lengths[0])
        return [(0, self.position), (end - 1, end)] if split == "train" else [(self.position, end)]

    def text_bytes(self, split: str, total: int) -> int:
        return self.head_bytes if split == "train" else total - self.head_bytes

    def record(self) -> dict[str, Any]:
        return {"kind": "position", "fraction": self.fraction, "threshold": self.position}


SplitRule = SplitByHash | SplitByPosition


def dropped(duplicates: Path | None, start: int, stop: int) -> Flags:
    """(stop - start,): which of the corpus's documents [start, stop) are left out as duplicates."""
    if duplicates is None or start == stop:
        return np.zeros(stop - start, np.bool_)
    return np.memmap(duplicates, np.bool_, "r", offset=start, shape=(stop - start,))


def numbered_parts(parts: list[Path], dtype: np.dtype[Any]) -> Iterator[tuple[Part, int]]:
    """Each part, and which document of the corpus its first one is."""
    number = 0
    for path in parts:
        part = Part(path, dtype)
        yield part, number
        number += part.summary.documents


def find_rule(parts: list[Path], tokenizer: Tokenizer, fraction: float, duplicates: Path | None) -> SplitRule:
    """The rule that gives val a `fraction` of the documents. Raises UserError if none can.

    A small corpus may have no document on one side of the threshold, which then moves to the
    nearest hash.
    """
    lowest, highest, count = HASH_RANGE, -1, 0
    last: Part | None = None
    for part, number in numbered_parts(parts, token_dtype(tokenizer.vocab_size)):
        kept = ~dropped(duplicates, number, number + part.summary.documents)
        if kept.any():
            hashes = part.hashes[kept, 0]
            lowest, highest = min(lowest, int(hashes.min())), max(highest, int(hashes.max()))
            count += len(hashes)
            last = part
    assert last is not None
    if count > 1 and lowest == highest:
        raise UserError(f"all {count} documents of the corpus are identical: expected different ones for train and val")
    if count == 1:
        # Duplicates keep their first document, so the only one is the first of its part.
        position = split_position(last.tokens[: int(last.lengths[0]) - 1], tokenizer, fraction)
        return SplitByPosition(fraction, position, _text_bytes(last, position, tokenizer))
    return SplitByHash(fraction, min(max(int(fraction * HASH_RANGE), lowest + 1), highest))


def split_position(ids: TokenIds, tokenizer: Tokenizer, fraction: float) -> int:
    """Where to divide a document: before a token that begins a character, neither half empty."""
    tokens = len(ids)
    if tokens < 2:
        raise UserError("the corpus is a single token: expected enough text for a train and a val split")
    latest = min(max(int(tokens * (1 - fraction)), 1), tokens - 1)
    # In UTF-8 every byte of a character but its first is 0b10xxxxxx.
    begins = (at for at in range(latest, 0, -1) if tokenizer.decode_bytes([int(ids[at])])[0] >> 6 != 0b10)
    return next(begins, latest)


def _text_bytes(part: Part, tokens: int, tokenizer: Tokenizer) -> int:
    """The bytes of text that the first `tokens` ids of a part stand for."""
    lengths = tokenizer.token_bytes()
    if lengths is None:
        return len(tokenizer.decode_bytes(part.tokens[:tokens].tolist()))
    size = 0
    for at in range(0, tokens, COPY_TOKENS):
        size += int(lengths.take(part.tokens[at : min(at + COPY_TOKENS, tokens)]).sum())
        part.release_memory()
    return size
