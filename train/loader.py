"""One dataset's shards -> windows, as a pure function of (seed, sample): the loader has no state.

    sample i  --epoch, place-->  window  --keyed permutation, computed-->  tokens [start, start + block_size]

An epoch takes every window of the split once, in an order that a keyed permutation of 0..windows-1 gives, one index at a
time: no index file, no start-up cost, any step in O(1). Each epoch has its own order and cuts its windows at its own offset.
Nothing depends on the number of ranks, so the global batch of a step is the same on 1, 2 or 64 of them.
"""

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from pipeline.errors import UserError
from pipeline.shards import TokenReader

Indices = npt.NDArray[np.uint64]
Samples = npt.NDArray[np.int64]

FEISTEL_ROUNDS = 6


class Loader:
    """Batches of windows: `block_size` inputs and the target after the last of them."""

    def __init__(self, reader: TokenReader, block_size: int, seed: int) -> None:
        self.reader, self.block_size, self.seed = reader, block_size, seed
        # One window is given up where possible, for room to shift the cuts from epoch to epoch.
        self.windows = max(1, len(reader) // block_size - 1)
        self.slack = len(reader) - 1 - self.windows * block_size
        if self.slack < 0:
            raise UserError(
                f"{reader.name} has {len(reader)} tokens, fewer than one block of {block_size} and its target: "
                "prepare more text, or lower model.block_size"
            )

    def batch(self, samples: Samples) -> Tensor:
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


def permute(index: Indices, size: int, key: int) -> Indices:
    """Where a permutation of 0..size-1, chosen by `key`, sends each index.

    A Feistel network is a bijection of 0..4^b-1 whatever its round function; walking on from results that are not below
    `size` makes it one of 0..size-1 (Black and Rogaway 2002, "cycle walking": at most 4 steps on average).
    """
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
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(x: Indices) -> Indices:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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


def windows_at(reader: TokenReader, starts: list[int], block_size: int) -> Tensor:
    """Windows (len(starts), block_size + 1), int64: a block of inputs and the target after the last of them."""
    return torch.from_numpy(np.stack([reader.read(start, start + block_size + 1) for start in starts]))
