"""One pass over the shards of a dataset, for those who look at every id: in blocks, several shards at a time.

Memory does not grow with the corpus: a shard is read in blocks of 1 MiB, and documents are arrays of where they lie.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.dataset.shards import Manifest, Shard
from pipeline.log import ProgressReport
from pipeline.vocabulary.tokenizer import TokenIds

Positions = npt.NDArray[np.int64]
Advance = Callable[[int], None]
Result = TypeVar("Result")

BLOCK_BYTES = 1 << 20  # with its intermediate arrays it stays in a core's cache
# numpy and xxhash let go of the interpreter's lock: one thread does about 1 GB/s, and few disks feed more than eight.
THREADS = 8


class DocumentFinder:
    """Finds a shard's documents by their end-of-text ids, as the ids come. `count` is the number of those ids so far.

    Where end-of-text stands before a document, what a shard holds before its first one has no beginning: it is left out.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.end_of_text: int = manifest.tokenizer["end_of_text"]
        self.position = self.count = 0
        self._begins_with_shard = manifest.end_of_text == "after each document"
        self._start = 0

    def feed(self, ids: TokenIds) -> tuple[Positions, Positions]:
        """The documents that end in these `ids`: where each starts in the shard, and its ids without end-of-text."""
        ends = np.flatnonzero(ids == self.end_of_text) + self.position
        starts = np.concatenate([[self._start], ends + 1])
        skipped = 0 if self.count or self._begins_with_shard else 1
        self.position += len(ids)
        self.count += len(ends)
        self._start = int(starts[-1])
        return starts[skipped:-1], (ends - starts[:-1])[skipped:]

    def rest(self) -> tuple[int, int]:
        """Start and length of what follows the last end-of-text: no whole document, unless end-of-text stands before."""
        return self._start, self.position - self._start


def each_shard(
    shards: list[Shard], report: ProgressReport, work: Callable[[Shard, Advance], Result]
) -> Iterator[Result]:
    """`work(shard, advance)` of every shard, in threads; results in the order of the shards.

    `work` calls `advance` with the bytes of each block it has done; that is also where it ends if nobody waits any more.
    """
    lock, abandoned = threading.Lock(), threading.Event()

    def advance(done: int) -> None:
        if abandoned.is_set():
            raise CancelledError
        with lock:
            report.advance(done / 1e6)

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        yield from pool.map(lambda shard: work(shard, advance), shards)
    finally:
        abandoned.set()
        pool.shutdown(cancel_futures=True)


def entropy_nats(counts: npt.NDArray[np.int64]) -> float:
    """H = -sum p ln p of what was counted: the loss of a model that knows how often each comes, and nothing else."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def blocks(path: Path, header_bytes: int) -> Iterator[bytes]:
    """A shard's bytes after its header."""
    with path.open("rb") as file:
        file.seek(header_bytes)
        while block := file.read(BLOCK_BYTES):
            yield block
