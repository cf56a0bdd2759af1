"""Parts -> the dataset's shards: which document goes where, and then shard by shard, in as many processes as there are.

Where everything goes follows from the parts' documents, their lengths and hashes; so shards are written independently,
and one that is there is whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from pipeline.errors import UserError
from pipeline.files import publish, write_atomic
from pipeline.scan import entropy_nats
from pipeline.shards import SPLITS, Shard
from pipeline.tokenizer import TokenIds, Tokenizer, token_dtype
from prepare.parts import Part

HASH_RANGE = 1 << 64
# Tokens that are copied, hashed and counted at a time: they stay in the processor's cache.
TOKENS_AT_ONCE = 1 << 20
# Pairs of tokens are counted for vocabularies up to this: the table of a larger one is larger than its text teaches.
MOST_BIGRAM_VOCAB = 1024


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


@dataclass(frozen=True)
class Stretch:
    """Documents [first, stop) of a part whose document 0 is the corpus's document `number`."""

    part: str
    number: int
    first: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    split: str
    number: int
    stretches: tuple[Stretch, ...]

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:05d}"


@dataclass(frozen=True)
class Assembly:
    """What every shard of a dataset has in common. `parts` holds the parts; `folder` is where shards go."""

    parts: Path
    folder: Path
    vocab_size: int
    end_of_text: int
    rule: SplitRule
    duplicates: Path | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    def chosen(self, split: str, part: Part, stretch: Stretch) -> npt.NDArray[np.bool_]:
        """Which documents of a stretch are the split's."""
        found = self.rule.chosen(split, part.hashes[stretch.first : stretch.stop])
        return found & ~dropped(self.duplicates, stretch.number + stretch.first, stretch.number + stretch.stop)


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


def plan_shards(parts: list[Path], assembly: Assembly, shard_tokens: int) -> list[ShardPlan]:
    """The shards of both splits: a document is never cut, and the one that fills a shard closes it."""
    if assembly.rule.kind == "position":
        parts = [path for path in parts if Part(path, assembly.dtype).summary.documents]
        whole = (Stretch(parts[0].name, 0, 0, 1),)
        return [ShardPlan(split, 0, whole) for split in SPLITS]
    plans: list[ShardPlan] = []
    for split in SPLITS:
        stretches: list[Stretch] = []
        filled = documents = 0
        closed = 0
        for path in parts:
            part = Part(path, assembly.dtype)
            whole_part = Stretch(path.name, documents, 0, part.summary.documents)
            documents += part.summary.documents
            mine = np.flatnonzero(assembly.chosen(split, part, whole_part))
            ends = np.cumsum(part.lengths[mine])
            at = taken = 0
            while taken < len(mine):
                upto = min(int(np.searchsorted(ends, at + shard_tokens - filled)) + 1, len(mine))
                stretches.append(Stretch(path.name, whole_part.number, int(mine[taken]), int(mine[upto - 1]) + 1))
                filled += int(ends[upto - 1]) - at
                at, taken = int(ends[upto - 1]), upto
                if filled >= shard_tokens:
                    plans.append(ShardPlan(split, closed, tuple(stretches)))
                    stretches, filled, closed = [], 0, closed + 1
        if stretches:
            plans.append(ShardPlan(split, closed, tuple(stretches)))
    return plans


def write_shard(job: tuple[Assembly, ShardPlan]) -> Shard:
    """Write a shard, and beside the parts what there is to say of it."""
    assembly, plan = job
    final = assembly.folder / f"{plan.name}.bin"
    partial = assembly.folder / f"{plan.name}.bin.partial"
    tokens = documents = text_bytes = 0
    content_hash = xxhash.xxh3_128()
    counts = Counts(assembly.vocab_size if plan.split == "train" else 0)
    with partial.open("wb") as file:
        for stretch in plan.stretches:
            part = Part(assembly.parts / stretch.part, assembly.dtype)
            chosen = assembly.chosen(plan.split, part, stretch)
            documents += int(chosen.sum())
            text_bytes += int(part.text_bytes[stretch.first : stretch.stop][chosen].sum())
            for ids in _tokens(assembly, plan.split, part, stretch, chosen):
                file.write(ids.data)
                content_hash.update(ids.data)
                counts.add(ids)
                tokens += len(ids)
                part.let_go()
    if assembly.rule.kind == "position":
        text_bytes = assembly.rule.head_bytes if plan.split == "train" else text_bytes - assembly.rule.head_bytes
    shard = Shard(final.name, tokens, documents, text_bytes, content_hash.hexdigest())
    counts.save(assembly.parts / f"{plan.name}.counts")
    write_atomic(assembly.parts / f"{plan.name}.json", orjson.dumps(asdict(shard)))
    publish(partial, final)
    return shard


def written_shard(assembly: Assembly, plan: ShardPlan) -> Shard | None:
    """The shard, if an earlier start wrote it."""
    if not (assembly.folder / f"{plan.name}.bin").exists():
        return None
    return Shard(**orjson.loads((assembly.parts / f"{plan.name}.json").read_bytes()))


def _tokens(
    assembly: Assembly, split: str, part: Part, stretch: Stretch, chosen: npt.NDArray[np.bool_]
) -> Iterator[TokenIds]:
    """The ids of the chosen documents, `TOKENS_AT_ONCE` or fewer at a time."""
    if assembly.rule.kind == "position":
        cut, end = assembly.rule.threshold, int(part.lengths[0])
        runs: list[Any] = [(0, cut), (end - 1, end)] if split == "train" else [(cut, end)]
    else:
        starts = np.concatenate([[0], np.cumsum(part.lengths[: stretch.stop])])[stretch.first :]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
        runs = starts[edges].reshape(-1, 2).tolist()
    waiting: list[TokenIds] = []
    room = TOKENS_AT_ONCE
    for start, stop in runs:
        while start < stop:
            upto = min(stop, start + room)
            waiting.append(part.tokens[start:upto])
            room -= upto - start
            start = upto
            if room == 0:
                yield np.concatenate(waiting)
                waiting, room = [], TOKENS_AT_ONCE
    if waiting:
        yield np.concatenate(waiting)


class Counts:
    """How often each token, and each pair of neighbours, occurs: with a vocabulary of 0 nothing is counted."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigrams = np.zeros(vocab_size, np.int64)
        small = vocab_size if vocab_size <= MOST_BIGRAM_VOCAB else 0
        self.bigrams = np.zeros((small, small), np.int64)
        self._last = np.zeros(0, np.int64)

    def add(self, ids: TokenIds) -> None:
        if self.vocab_size:
            self.unigrams += np.bincount(ids, minlength=self.vocab_size)
        if len(self.bigrams):
            row = np.concatenate([self._last, ids.astype(np.int64)])
            pairs = np.bincount(row[:-1] * self.vocab_size + row[1:], minlength=self.bigrams.size)
            self.bigrams += pairs.reshape(self.bigrams.shape)
            self._last = row[-1:]

    def save(self, path: Path) -> None:
        write_atomic(path, np.concatenate([self.unigrams, self.bigrams.ravel()]).astype("<i8").tobytes())

    def load(self, path: Path) -> None:
        """Add what `save` wrote."""
        saved = np.fromfile(path, dtype="<i8")
        self.unigrams += saved[: self.vocab_size]
        self.bigrams += saved[self.vocab_size :].reshape(self.bigrams.shape)


def statistics(assembly: Assembly, plans: Sequence[ShardPlan], shards: Sequence[Shard]) -> dict[str, Any]:
    """Entropies in nats of the train split's tokens: of one alone, and of one when the one before it is known.

    A model that only counts tokens, or pairs, reaches these losses (H = -sum p ln p); a trained one has to get below.
    """
    counts = Counts(assembly.vocab_size)
    for plan in plans:
        if plan.split == "train":
            counts.load(assembly.parts / f"{plan.name}.counts")
    found: dict[str, Any] = {
        "bytes_per_token": round(sum(shard.bytes or 0 for shard in shards) / sum(shard.tokens for shard in shards), 4),
        "unigram_entropy_nats": round(entropy_nats(counts.unigrams), 4),
    }
    if len(counts.bigrams):
        first = counts.bigrams.sum(axis=1)
        found["bigram_entropy_nats"] = round(entropy_nats(counts.bigrams.ravel()) - entropy_nats(first), 4)
    return found
