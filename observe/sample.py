"""A sample of the documents of a split, taken while every id is read.

The documents whose keys have the smallest hashes: uniform over distinct documents, the same for any
order and number of threads, and with every copy of a document that it holds. So the share of copies
in it estimates that in the split, which a sample by position would not.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from observe.shared_documents import document_keys
from pipeline.dataset.scan import Positions
from pipeline.vocabulary.tokenizer import TokenIds

SAMPLE_DOCUMENTS = 1000
_SAMPLED = np.dtype([("hash", "<u8"), ("key", "<u8"), ("shard", "<i8"), ("start", "<i8"), ("length", "<i8")])
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
