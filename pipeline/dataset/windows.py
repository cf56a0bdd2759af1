"""One dataset's shards -> windows, as a pure function of (seed, sample): the loader has no state.

    sample i  --epoch, position in it-->  window  --keyed permutation, computed-->  tokens [start, start + block_size]

An epoch takes every window of the split once, in an order that a keyed permutation of 0..windows-1
gives, one index at a time: no index file, no start-up cost, any step in O(1). Each epoch has its
own order, and its windows begin at its own offset. Nothing depends on the number of ranks, so the
global batch of a step is the same on 1, 2 or 64 of them.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.dataset.shards import TokenReader
from pipeline.errors import UserError

Windows = npt.NDArray[np.int64]
Samples = npt.NDArray[np.int64]
Indices = npt.NDArray[np.uint64]

FEISTEL_ROUNDS = 6


class Loader:
    """Batches of windows: `block_size` inputs and the target after the last of them."""

    def __init__(self, reader: TokenReader, block_size: int, seed: int) -> None:
        self.reader, self.block_size, self.seed = reader, block_size, seed
        check_length(reader.folder, reader.split, len(reader), block_size)
        self.windows = window_count(len(reader), block_size)
        self.slack = len(reader) - 1 - self.windows * block_size  # by so much an epoch may shift its windows

    def batch(self, samples: Samples) -> Windows:
        """The windows (len(samples), block_size + 1), int64, of this dataset's `samples`."""
        return windows_at(self.reader, self.starts(samples), self.block_size)

    def starts(self, samples: Samples) -> list[int]:
        """The position in the split at which each sample begins."""
        starts = np.empty(len(samples), dtype=np.int64)
        epochs, positions = np.divmod(samples, self.windows)
        for epoch in np.unique(epochs):
            key = xxhash.xxh3_64_intdigest(b"%d:%d" % (self.seed, epoch))
            here = epochs == epoch
            windows = permute(positions[here].astype(np.uint64), self.windows, key).astype(np.int64)
            # The shift changes which tokens share a window, so that no pair of neighbours is split
            # in every epoch.
            starts[here] = key % (self.slack + 1) + windows * self.block_size
        return [int(start) for start in starts]


def window_count(tokens: int, block_size: int) -> int:
    """Windows of an epoch. One is given up where possible, for room to shift the others from epoch
    to epoch.
    """
    return max(1, tokens // block_size - 1)


def evaluation_starts(reader: TokenReader, block_size: int, windows: int) -> list[int]:
    """Starts of `windows` windows spread evenly over a split, 0 for all of them: the same ones at
    every evaluation.
    """
    check_length(reader.folder, reader.split, len(reader), block_size)
    available = (len(reader) - 1) // block_size
    taken = min(windows, available) if windows else available
    # Fixed, so that losses compare between evaluations; spread, as a split's beginning may be of
    # one source.
    return [index * available // taken * block_size for index in range(taken)]


def check_length(folder: Path, split: str, tokens: int, block_size: int) -> None:
    """Raises UserError for a split without a single window: a block and the target after its last
    token.
    """
    if tokens > block_size:
        return
    if split == "val" and tokens == 0:
        raise UserError(
            f"{folder} has no val split: train without evaluation (eval.every_steps=0), or prepare it again with a "
            "--val-fraction above 0"
        )
    remedy = "prepare more text, or lower model.block_size"
    if split == "val":
        remedy = "prepare with a larger --val-fraction, lower model.block_size, or turn evaluation off with eval.every_steps=0"
    raise UserError(
        f"{folder}'s {split} split has {tokens} tokens, fewer than one block of {block_size} and its target: {remedy}"
    )


def windows_at(reader: TokenReader, starts: list[int], block_size: int) -> Windows:
    """Windows (len(starts), block_size + 1), int64: a block of inputs and the target after the last
    of them.
    """
    return np.stack([reader.read(start, start + block_size + 1) for start in starts])


# ---- the order of an epoch: a keyed permutation, computed one index at a time ----


def permute(index: Indices, size: int, key: int) -> Indices:
    """The images of `index` under a permutation of 0..size-1 that is chosen by `key`.

    A Feistel network is a bijection of 0..4^b-1 for any round function; applying it again to
    results that are not below `size` makes it one of 0..size-1 (Black and Rogaway 2002, "cycle
    walking": at most 4 steps on average).
    """
    # Half the bits of the smallest 4^b that is not below `size`; a single window still needs two
    # halves of one bit.
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    result = _feistel(index, half_bits, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, key)
    return result


def _feistel(index: Indices, half_bits: np.uint64, key: int) -> Indices:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = index >> half_bits, index & mask
    for round_ in range(FEISTEL_ROUNDS):
        round_key = np.uint64(xxhash.xxh3_64_intdigest(round_.to_bytes(8, "little"), seed=key))
        # left ^ f(right) is undone by repeating it, which is why this is a bijection.
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(x: Indices) -> Indices:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every
    output bit.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
