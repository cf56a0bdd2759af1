"""Units of text -> token arrays, in many processes, in order; and the rule that says which document is validation text.

What comes out depends on the corpus, the tokenizer and the seed alone: units are cut before the number of workers is
looked at, and results are taken in the order of the units.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import UserError
from pipeline.shards import SPLITS
from pipeline.tokenizer import TokenIds, Tokenizer, rebuild, token_dtype
from prepare.engine import EngineFault, Gigatoken
from prepare.readers import Unit

HASH_RANGE = 1 << 64
# For each worker one unit being encoded and three waiting: it stays busy while a slow unit holds up the order, and
# memory stays flat.
UNITS_IN_FLIGHT = 4


@dataclass(frozen=True)
class SplitRule:
    """Which split a text belongs to.

    hash: val holds the documents whose XXH3-64 is below `threshold`. It looks at content only, so exact duplicates stay
    together and added documents move no others. position: a lone document is cut, its tail is val.
    """

    kind: str
    fraction: float
    threshold: int
    seed: int

    def assign(self, text: str, content: bytes) -> list[tuple[str, str, int]]:
        """The (split, text, UTF-8 bytes) a document adds."""
        if self.kind == "hash":
            return [("val" if document_hash(content, self.seed) < self.threshold else "train", text, len(content))]
        # One character at least for each side, whatever the fraction.
        cut = min(max(int(len(text) * (1 - self.fraction)), 1), len(text) - 1)
        head = len(text[:cut].encode())
        return [("train", text[:cut], head), ("val", text[cut:], len(content) - head)]

    def record(self) -> dict[str, Any]:
        threshold = {"threshold": self.threshold, "hash": "xxh3_64"} if self.kind == "hash" else {}
        return {"kind": self.kind, "fraction": self.fraction, **threshold}


def document_hash(content: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(content, seed)


def survey(documents: Iterator[str], fraction: float, seed: int) -> SplitRule:
    """Read until both splits are sure to get a document: a few megabytes of a big corpus, the whole of a small one.

    A small corpus may have no document on one side of the threshold; it then moves to the nearest hash.
    """
    threshold = int(fraction * HASH_RANGE)
    lowest, highest, count, last = HASH_RANGE, -1, 0, ""
    for last in documents:
        count += 1
        digest = document_hash(last.encode(), seed)
        lowest, highest = min(lowest, digest), max(highest, digest)
        if lowest < threshold <= highest:
            break
    if count == 0:
        raise UserError("the corpus is empty: no source holds a document with text in it")
    if count == 1 and len(last) < 2:
        raise UserError("the corpus is a single character: wanted enough text for a train and a val split")
    if count > 1 and lowest == highest:
        raise UserError(f"all {count} documents of the corpus are identical: wanted different ones for train and val")
    kind = "position" if count == 1 else "hash"
    threshold = min(max(threshold, lowest + 1), highest)
    return SplitRule(kind, fraction, threshold, seed)


def texts(units: Iterable[Unit], limit: int | None) -> Iterator[str]:
    """The first `limit` documents that are not empty."""
    return islice((text for unit in units for text in unit.documents() if text), limit)


@dataclass(frozen=True)
class Documents:
    """Encoded documents of one split: their tokens on end, and for each its number of tokens and of UTF-8 bytes."""

    tokens: TokenIds
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """One unit, encoded. Arrays only: they cross to the parent as they lie in memory, lists would cost it its time."""

    size: int
    documents: int
    splits: dict[str, Documents]
    skipped: dict[str, int]


class _Collector:
    """Gathers one split of a unit. One growing buffer: thousands of small arrays kept alive cost 8 % of encoding."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.end = np.array([tokenizer.end_of_text], dtype=self.dtype).tobytes()
        self.tokens = bytearray()
        self.lengths: list[int] = []
        self.text_bytes: list[int] = []

    def add(self, ids: TokenIds, text_bytes: int) -> None:
        self.tokens += ids.data
        self.tokens += self.end
        self.lengths.append(len(ids) + 1)
        self.text_bytes.append(text_bytes)

    def documents(self) -> Documents:
        lengths, text_bytes = (np.array(counts, dtype=np.int64) for counts in (self.lengths, self.text_bytes))
        return Documents(np.frombuffer(self.tokens, dtype=self.dtype), lengths, text_bytes)


def encode_unit(unit: Unit, tokenizer: Tokenizer, rule: SplitRule, limit: int | None) -> Encoded:
    """Encode at most `limit` documents of a unit, each ended by end-of-text."""
    if isinstance(tokenizer, Gigatoken):
        tokenizer.begin_unit()
    splits = {split: _Collector(tokenizer) for split in SPLITS}
    skipped: Counter[str] = Counter()
    count = 0
    for text in unit.documents():
        if not text:
            skipped["null" if text is None else "empty"] += 1
            continue
        parts = rule.assign(text, text.encode())
        try:
            encoded = [tokenizer.encode(part) for _, part, _ in parts]
        except ValueError:  # tiktoken's regular expressions give up on a million spaces before a word
            skipped["refused by the tokenizer"] += 1
            continue
        for (split, _, size), ids in zip(parts, encoded, strict=True):
            splits[split].add(ids, size)
        count += 1
        if count == limit:
            break
    return Encoded(unit.size, count, {split: found.documents() for split, found in splits.items()}, dict(skipped))


def encode_corpus(
    units: Iterable[Unit], tokenizer: Tokenizer, rule: SplitRule, workers: int, limit: int | None
) -> Iterator[Encoded]:
    """Every unit encoded, in order; with a `limit`, exactly that many documents in all."""
    if isinstance(units, list):
        workers = min(workers, len(units))
    results = (
        _in_parent(units, tokenizer, rule, limit) if workers <= 1 else _in_pool(units, tokenizer, rule, workers, limit)
    )
    left = limit
    for unit, encoded in results:
        if left is not None:
            if encoded.documents >= left:  # again, up to the last wanted document and no further
                encoded = encode_unit(unit, tokenizer, rule, left)
            left -= encoded.documents
        yield encoded
        if left == 0:
            return


_Results = Iterator[tuple[Unit, Encoded]]


def _in_parent(units: Iterable[Unit], tokenizer: Tokenizer, rule: SplitRule, limit: int | None) -> _Results:
    for unit in units:
        yield unit, encode_unit(unit, tokenizer, rule, limit)


def _in_pool(units: Iterable[Unit], tokenizer: Tokenizer, rule: SplitRule, workers: int, limit: int | None) -> _Results:
    # spawn: a forked child would inherit the threads of pyarrow and datasets in whatever state they are.
    context = multiprocessing.get_context("spawn")
    fast = isinstance(tokenizer, Gigatoken)
    pool = ProcessPoolExecutor(
        workers, context, _start_worker, (tokenizer.spec(), tokenizer.files(), fast, rule, limit)
    )
    pending: deque[tuple[Unit, Future[Encoded]]] = deque()
    try:
        for unit in units:
            pending.append((unit, pool.submit(_encode_in_worker, unit)))
            if len(pending) >= UNITS_IN_FLIGHT * workers:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        while pending:
            oldest, future = pending.popleft()
            yield oldest, future.result()
    except BrokenProcessPool:
        if fast:
            raise EngineFault("may have killed a worker") from None
        raise UserError(
            f"one of the {workers} workers was killed, usually because memory ran out: run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, SplitRule, int | None]


def _start_worker(
    spec: dict[str, Any], files: dict[str, bytes], fast: bool, rule: SplitRule, limit: int | None
) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (Gigatoken() if fast else rebuild(spec, files), rule, limit)


def _die_with_parent() -> None:
    """A worker waits on a pipe whose writing end it holds too: after kill -9 of the parent it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(unit: Unit) -> Encoded:
    return encode_unit(unit, *_worker)
