"""Which document belongs to train and which to val."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer, token_dtype
from prepare.unfinished.parts import Part

HASH_RANGE = 1 << 64
# Tokens that are copied, hashed and counted at a time: they stay in the processor's cache.
TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class SplitRule:
    """Which split a document belongs to.

    hash: val holds the documents whose hash (the high half of XXH3-128, seeded) is below `threshold`. It looks at
    content only, so exact duplicates stay together and added documents move no others. position: a lone document is cut
    before its token `threshold`, after `head_bytes` of its text, and its tail is val.
    """

    kind: str
    fraction: float
    threshold: int
    head_bytes: int = 0

    def chosen(self, split: str, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        if self.kind == "position":
            return np.ones(len(hashes), np.bool_)
        val: npt.NDArray[np.bool_] = hashes[:, 0] < np.uint64(self.threshold)
        return val if split == "val" else ~val

    def record(self) -> dict[str, Any]:
        hashed = {"hash": "xxh3_128, high half, seeded"} if self.kind == "hash" else {}
        return {"kind": self.kind, "fraction": self.fraction, "threshold": self.threshold, **hashed}


def dropped(duplicates: Path | None, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Of the corpus's documents [start, stop), those that are left out as duplicates."""
    if duplicates is None or start == stop:
        return np.zeros(stop - start, np.bool_)
    return np.memmap(duplicates, np.bool_, "r", offset=start, shape=(stop - start,))


def find_rule(parts: list[Path], tokenizer: Tokenizer, fraction: float, duplicates: Path | None) -> SplitRule:
    """A small corpus may have no document on one side of the threshold; it then moves to the nearest hash."""
    threshold = int(fraction * HASH_RANGE)
    lowest, highest, count, number = HASH_RANGE, -1, 0, 0
    alone: Part | None = None
    for path in parts:
        part = Part(path, token_dtype(tokenizer.vocab_size))
        kept = ~dropped(duplicates, number, number + part.summary.documents)
        number += part.summary.documents
        if kept.any():
            hashes = part.hashes[kept, 0]
            lowest, highest = min(lowest, int(hashes.min())), max(highest, int(hashes.max()))
            count += len(hashes)
            alone = part
    assert alone is not None
    if count > 1 and lowest == highest:
        raise UserError(f"all {count} documents of the corpus are identical: wanted different ones for train and val")
    if count == 1:
        cut = _cut(alone.tokens[: int(alone.lengths[0]) - 1], tokenizer, fraction)
        return SplitRule("position", fraction, cut, _text_bytes(alone, cut, tokenizer))
    return SplitRule("hash", fraction, min(max(threshold, lowest + 1), highest))


def _cut(ids: TokenIds, tokenizer: Tokenizer, fraction: float) -> int:
    """Where a lone document is cut: before a token that begins a character, with at least one on each side."""
    tokens = len(ids)
    if tokens < 2:
        raise UserError("the corpus is a single token: wanted enough text for a train and a val split")
    latest = min(max(int(tokens * (1 - fraction)), 1), tokens - 1)
    # Inside a character every further byte is 0b10xxxxxx.
    begins = (at for at in range(latest, 0, -1) if tokenizer.decode_bytes([int(ids[at])])[0] >> 6 != 0b10)
    return next(begins, latest)


def _text_bytes(part: Part, cut: int, tokenizer: Tokenizer) -> int:
    """Of the part's first `cut` ids."""
    lengths = tokenizer.token_bytes()
    if lengths is None:
        return len(tokenizer.decode_bytes(part.tokens[:cut].tolist()))
    size = 0
    for at in range(0, cut, TOKENS_AT_ONCE):
        size += int(lengths.take(part.tokens[at : min(at + TOKENS_AT_ONCE, cut)]).sum())
        part.let_go()
    return size
