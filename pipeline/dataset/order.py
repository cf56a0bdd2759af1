"""A keyed permutation: the order in which an epoch visits its windows, computed one index at a
time.
"""

import numpy as np
import numpy.typing as npt
import xxhash

Indices = npt.NDArray[np.uint64]
Samples = npt.NDArray[np.int64]

FEISTEL_ROUNDS = 6


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
