"""One dataset's shards -> windows, as a pure function of (seed, sample): the loader has no state.

    sample i  --epoch, place-->  window  --keyed permutation, computed-->  tokens [start, start + block_size]

An epoch takes every window of the split once, in an order that a keyed permutation of 0..windows-1 gives, one index at a
time: no index file, no start-up cost, any step in O(1). Each epoch has its own order and cuts its windows at its own offset.
Nothing depends on the number of ranks, so the global batch of a step is the same on 1, 2 or 64 of them.
"""

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.dataset.order import Samples, permute
from pipeline.dataset.shards import TokenReader
from pipeline.errors import UserError

Windows = npt.NDArray[np.int64]


class Loader:
    """Batches of windows: `block_size` inputs and the target after the last of them."""

    def __init__(self, reader: TokenReader, block_size: int, seed: int) -> None:
        self.reader, self.block_size, self.seed = reader, block_size, seed
        self.windows = window_count(len(reader), block_size)
        self.slack = len(reader) - 1 - self.windows * block_size
        if self.slack < 0:
            raise UserError(
                f"{reader.name} has {len(reader)} tokens, fewer than one block of {block_size} and its target: "
                "prepare more text, or lower model.block_size"
            )

    def batch(self, samples: Samples) -> Windows:
        """The windows (len(samples), block_size + 1), int64, of this dataset's `samples`."""
        return windows_at(self.reader, self.starts(samples), self.block_size)

    def starts(self, samples: Samples) -> list[int]:
        """The position in the split at which each sample begins."""
        starts = np.empty(len(samples), dtype=np.int64)
        epochs, places = np.divmod(samples, self.windows)
        for epoch in np.unique(epochs):
            key = xxhash.xxh3_64_intdigest(b"%d:%d" % (self.seed, epoch))
            here = epochs == epoch
            windows = permute(places[here].astype(np.uint64), self.windows, key).astype(np.int64)
            starts[here] = key % (self.slack + 1) + windows * self.block_size
        return [int(start) for start in starts]


def window_count(tokens: int, block_size: int) -> int:
    """Windows of an epoch. One is given up where possible, for room to shift the boundaries from epoch to epoch."""
    return max(1, tokens // block_size - 1)


def evaluation_starts(reader: TokenReader, block_size: int, windows: int) -> list[int]:
    """Starts of `windows` windows spread evenly over a split, 0 for all of them: the same ones at every evaluation."""
    there = (len(reader) - 1) // block_size
    if there < 1:
        raise UserError(
            f"{reader.name} has {len(reader)} tokens, fewer than one block of {block_size} and its target: prepare "
            "with a larger --val-fraction, lower model.block_size, or turn evaluation off with eval.every_steps=0"
        )
    taken = min(windows, there) if windows else there
    return [index * there // taken * block_size for index in range(taken)]


def windows_at(reader: TokenReader, starts: list[int], block_size: int) -> Windows:
    """Windows (len(starts), block_size + 1), int64: a block of inputs and the target after the last of them."""
    return np.stack([reader.read(start, start + block_size + 1) for start in starts])
