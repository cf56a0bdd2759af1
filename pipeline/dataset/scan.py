"""One pass over every id of a dataset's shards: in blocks, several shards at a time.

Memory does not grow with the corpus: a shard is read in blocks of 1 MiB, and documents are arrays
of positions.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.dataset.shards import Manifest, Shard, TokenReader
from pipeline.log import ProgressReport
from pipeline.vocabulary.tokenizer import TokenIds

Positions = npt.NDArray[np.int64]
Advance = Callable[[int], None]
T = TypeVar("T")

BLOCK_BYTES = 1 << 20  # with its intermediate arrays it stays in a core's cache
# numpy and xxhash release the interpreter's lock: one thread does about 1 GB/s, and few disks feed
# more than eight.
THREADS = 8
SAMPLE_PIECES, PIECE_IDS = 64, 1 << 15  # of `sampled_entropies`: 2 million ids take 0.3 s


class DocumentFinder:
    """Finds a shard's documents in a stream of its ids. `count` is the number of end-of-text tokens
    so far.

    Where that token comes before a document, whatever precedes the first one has no beginning, and
    is left out.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.end_of_text: int = manifest.tokenizer["end_of_text"]
        self.position = self.count = 0
        self._begins_with_shard = manifest.end_of_text_follows
        self._start = 0

    def feed(self, ids: TokenIds) -> tuple[Positions, Positions]:
        """The documents that end in these `ids`: start in the shard and number of ids, without the
        end-of-text token.
        """
        ends = np.flatnonzero(ids == self.end_of_text) + self.position
        # A document may have begun in an earlier block: its start is carried from call to call.
        starts = np.concatenate([[self._start], ends + 1])
        skipped = 0 if self.count or self._begins_with_shard else 1
        self.position += len(ids)
        self.count += len(ends)
        self._start = int(starts[-1])
        return starts[skipped:-1], (ends - starts[:-1])[skipped:]

    def rest(self) -> tuple[int, int]:
        """Start and length of what follows the last end-of-text token: not a complete document,
        unless those come before.
        """
        return self._start, self.position - self._start


def each_shard(shards: list[Shard], report: ProgressReport, work: Callable[[Shard, Advance], T]) -> Iterator[T]:
    """`work(shard, advance)` for every shard, in threads; results in the order of the shards.

    `work` calls `advance` with the size of each block it has done, which raises once the caller has
    stopped waiting.
    """
    lock, abandoned = threading.Lock(), threading.Event()

    def advance(done: int) -> None:
        if abandoned.is_set():
            raise CancelledError
        with lock:
            report.advance(done / 1e6)

    # Threads, as a process would have to send its arrays of positions back.
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        yield from pool.map(lambda shard: work(shard, advance), shards)
    finally:
        abandoned.set()
        pool.shutdown(cancel_futures=True)


def entropy_nats(counts: npt.NDArray[np.int64]) -> float:
    """H = -sum p ln p: the loss in nats of a model that knows how frequent each thing is, and
    nothing else.
    """
    p = counts[counts > 0] / counts.sum()
    return float(abs((p * np.log(p)).sum()))  # not -0.0 without any counts


def sampled_entropies(reader: TokenReader) -> tuple[float, float]:
    """Unigram entropy, and that of a token given the one before, in nats, of at most 2 million ids from
    all over a split. For a large vocabulary the second is too low: most pairs occur once in a sample.
    """
    count = min(SAMPLE_PIECES, -(-len(reader) // PIECE_IDS))
    starts = [index * max(0, len(reader) - PIECE_IDS) // max(1, count - 1) for index in range(count)]
    pieces = [reader.read(start, min(len(reader), start + PIECE_IDS)) for start in starts]
    pairs = np.concatenate([piece[:-1] * reader.vocab_size + piece[1:] for piece in pieces])
    before = np.concatenate([piece[:-1] for piece in pieces])
    # H(next | before) = H(before, next) - H(before).
    unigrams = entropy_nats(np.bincount(before))
    return unigrams, entropy_nats(np.unique(pairs, return_counts=True)[1]) - unigrams


def blocks(path: Path, header_bytes: int) -> Iterator[bytes]:
    """A shard's bytes after its header, up to 1 MiB at a time."""
    with path.open("rb") as file:
        file.seek(header_bytes)
        while block := file.read(BLOCK_BYTES):
            yield block
