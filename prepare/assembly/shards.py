"""Parts -> the dataset's shards.

First the layout: which documents go into which shard follows from the parts' document lengths and
hashes alone, and takes no look at a token. Then each shard is copied from the parts by itself, in
any process and in any order; a shard whose file exists is complete, so a killed run resumes with
the next one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from pipeline.dataset.scan import entropy_nats
from pipeline.dataset.shards import SPLITS, Shard
from pipeline.files import publish, write_atomic
from pipeline.vocabulary.tokenizer import TokenIds, token_dtype
from prepare.assembly.counts import Counts
from prepare.assembly.splits import COPY_TOKENS, Flags, SplitRule, dropped, numbered_parts
from prepare.unfinished.parts import Part


@dataclass(frozen=True)
class DocumentRange:
    """Documents [first, stop) of a part whose document 0 is document `number` of the corpus."""

    part: str
    number: int
    first: int
    stop: int


@dataclass(frozen=True)
class ShardLayout:
    """Where the documents of a shard are.

    The ranges also hold documents of the other split, and duplicates.
    """

    split: str
    number: int
    ranges: tuple[DocumentRange, ...]

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:05d}"


@dataclass(frozen=True)
class Assembly:
    """What all shards have in common.

    `parts` is the folder of parts, `folder` that of the shards.
    """

    parts: Path
    folder: Path
    vocab_size: int
    rule: SplitRule
    duplicates: Path | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    def chosen(self, split: str, part: Part, documents: DocumentRange) -> Flags:
        """(stop - first,): which documents of a range are in the split."""
        first, stop, number = documents.first, documents.stop, documents.number
        return self.rule.chosen(split, part.hashes[first:stop]) & ~dropped(
            self.duplicates, number + first, number + stop
        )


def lay_out_shards(parts: list[Path], assembly: Assembly, shard_tokens: int) -> list[ShardLayout]:
    """The shards of both splits.

    A document is never divided: the one that brings a shard to `shard_tokens` closes it.
    """
    return [layout for split in SPLITS for layout in _lay_out_split(split, parts, assembly, shard_tokens)]


def _lay_out_split(split: str, parts: list[Path], assembly: Assembly, shard_tokens: int) -> Iterator[ShardLayout]:
    shard = filled = 0
    ranges: list[DocumentRange] = []
    for part, number in numbered_parts(parts, assembly.dtype):
        everything = DocumentRange(part.path.name, number, 0, part.summary.documents)
        mine = np.flatnonzero(assembly.chosen(split, part, everything))
        # Tokens of the split in this part, up to and with each of its documents. They increase, so
        # a binary search finds the document that fills a shard, in one step a shard instead of one
        # a document.
        ends = np.cumsum(part.lengths[mine])
        # Of those documents `taken` are in shards already, with `begin` tokens.
        taken = begin = 0
        while taken < len(mine):
            stop = min(int(np.searchsorted(ends, begin + shard_tokens - filled)) + 1, len(mine))
            ranges.append(DocumentRange(part.path.name, number, int(mine[taken]), int(mine[stop - 1]) + 1))
            filled += int(ends[stop - 1]) - begin
            begin, taken = int(ends[stop - 1]), stop
            if filled >= shard_tokens:
                yield ShardLayout(split, shard, tuple(ranges))
                ranges, filled, shard = [], 0, shard + 1
    if ranges:
        yield ShardLayout(split, shard, tuple(ranges))


def write_shard(arguments: tuple[Assembly, ShardLayout]) -> Shard:
    """Write a shard, and next to the parts its token counts and its entry for the manifest."""
    assembly, layout = arguments
    final = assembly.folder / f"{layout.name}.bin"
    partial = assembly.folder / f"{layout.name}.bin.partial"
    tokens = documents = text_bytes = 0
    content_hash = xxhash.xxh3_128()
    counts = Counts(assembly.vocab_size if layout.split == "train" else 0)
    with partial.open("wb") as file:
        for each in layout.ranges:
            part = Part(assembly.parts / each.part, assembly.dtype)
            chosen = assembly.chosen(layout.split, part, each)
            documents += int(chosen.sum())
            text_bytes += int(part.text_bytes[each.first : each.stop][chosen].sum())
            for ids in _copied(part, assembly.rule.token_ranges(layout.split, part.lengths[: each.stop], chosen)):
                file.write(ids.data)
                content_hash.update(ids.data)
                counts.add(ids)
                tokens += len(ids)
                part.release_memory()  # else one long document would be in memory as a whole
    text_bytes = assembly.rule.text_bytes(layout.split, text_bytes)
    # The hash is of all that was written, so that `verify` finds damage that came afterwards.
    digest = content_hash.hexdigest()
    shard = Shard(file=final.name, tokens=tokens, documents=documents, bytes=text_bytes, hash=digest)
    # Renamed last: `written_shard` takes the file of tokens as the sign that these two exist as
    # well.
    counts.save(assembly.parts / f"{layout.name}.counts")
    write_atomic(assembly.parts / f"{layout.name}.json", orjson.dumps(asdict(shard)))
    publish(partial, final)
    return shard


def written_shard(assembly: Assembly, layout: ShardLayout) -> Shard | None:
    """The shard, if an earlier run has written it."""
    if not (assembly.folder / f"{layout.name}.bin").exists():
        return None
    return Shard(**orjson.loads((assembly.parts / f"{layout.name}.json").read_bytes()))


def _copied(part: Part, ranges: list[tuple[int, int]]) -> Iterator[TokenIds]:
    """The part's ids in `ranges`, `COPY_TOKENS` or fewer at a time.

    Ranges may be as short as a document or longer than memory, so short ones are joined and long
    ones divided.
    """
    waiting: list[TokenIds] = []
    room = COPY_TOKENS
    for start, stop in ranges:
        while start < stop:
            upto = min(stop, start + room)
            waiting.append(part.tokens[start:upto])
            room -= upto - start
            start = upto
            if room == 0:
                yield np.concatenate(waiting)
                waiting, room = [], COPY_TOKENS
    if waiting:
        yield np.concatenate(waiting)


def statistics(assembly: Assembly, layouts: Sequence[ShardLayout], shards: Sequence[Shard]) -> dict[str, Any]:
    """Entropies of the train split in nats: of a token, and of a token given the one before it.

    They are the losses of a model that knows only the counts of tokens, or of pairs (H = -sum p ln
    p): a trained model has to get below both.
    """
    counts = Counts(assembly.vocab_size)
    for layout in layouts:
        if layout.split == "train":
            counts.load(assembly.parts / f"{layout.name}.counts")
    found: dict[str, Any] = {
        "bytes_per_token": round(sum(shard.bytes or 0 for shard in shards) / sum(shard.tokens for shard in shards), 4),
        "unigram_entropy_nats": round(entropy_nats(counts.unigrams), 4),
    }
    if len(counts.bigrams):
        # H(second | first) = H(first, second) - H(first)
        first = counts.bigrams.sum(axis=1)
        found["bigram_entropy_nats"] = round(entropy_nats(counts.bigrams.ravel()) - entropy_nats(first), 4)
    return found
