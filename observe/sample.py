"""A sample of the documents of a split, taken while every id is read.

The documents whose keys have the smallest hashes: uniform over distinct documents, the same for any
order and number of threads, and with every copy of a document that it holds. So the share of copies
in it estimates that in the split, which a sample by position would not.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.scan import Positions
from pipeline.vocabulary.tokenizer import TokenIds

SAMPLE_DOCUMENTS = 1000
_SAMPLED = np.dtype([("hash", "<u8"), ("key", "<u8"), ("shard", "<i8"), ("start", "<i8"), ("length", "<i8")])
KEY_IDS = 16
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying modulo 2**64 loses nothing
NO_DOCUMENTS: npt.NDArray[Any] = np.zeros(0, _SAMPLED)


def documents_of(number: int, ids: TokenIds, starts: Positions, lengths: Positions) -> npt.NDArray[Any]:
    """The documents of shard `number` as entries of a sample; empty ones are left out."""
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    found = np.empty(len(starts), _SAMPLED)
    found["key"] = keys = document_keys(ids, starts, lengths)
    # Multiplied once more, as equal lengths and first ids would give neighbouring keys.
    found["hash"] = (keys ^ (keys >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    found["shard"], found["start"], found["length"] = number, starts, lengths
    return found


def smallest(*samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One sample of several, by hash and then by position."""
    together = np.concatenate(samples)
    if len(together) > SAMPLE_DOCUMENTS:
        limit = np.partition(together["hash"], SAMPLE_DOCUMENTS)[SAMPLE_DOCUMENTS]
        together = together[together["hash"] <= limit]
    return together[np.lexsort((together["start"], together["shard"], together["hash"]))][:SAMPLE_DOCUMENTS]


def document_keys(ids: TokenIds, starts: Positions, lengths: Positions) -> npt.NDArray[np.uint64]:
    """A number for each document, equal for equal documents; none may be empty. It takes the length and
    16 of the ids: hashing all of them, one document at a time, would double the time of a pass.
    """
    keys: npt.NDArray[np.uint64] = lengths.astype(np.uint64)
    # Evenly spaced, from the first id to the last.
    for taken in range(KEY_IDS):
        keys = (keys + ids[starts + (lengths - 1) * taken // (KEY_IDS - 1)]) * _FACTOR
    return keys
