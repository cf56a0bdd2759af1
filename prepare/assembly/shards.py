"""Parts -> the dataset's shards.

First the layout: which documents go into which shard follows from the parts' document lengths and
hashes alone, and takes no look at a token. Then each shard is copied from the parts by itself, in
any process and in any order; a shard whose file exists is complete, so a killed run resumes with
the next one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.dataset.scan import entropy_nats
from pipeline.dataset.shards import SPLITS, Shard
from pipeline.files import dump_json, parse_json, publish, write_atomic
from pipeline.vocabulary.tokenizer import TokenIds, token_dtype
from prepare.assembly.splits import COPY_TOKENS, DocumentRange, Flags, SplitByHash, dropped, numbered_parts, sizes
from prepare.unfinished.parts import Part

# Pairs are counted for vocabularies up to this size, whose table takes 8 MB. For GPT-2's it would
# take 20 GB, and most of its pairs occur too rarely for their counts to mean anything.
MAX_BIGRAM_VOCAB = 1024


class Selection(NamedTuple):
    """What documents give to a split, (documents,) each: tokens with end-of-text, and bytes of
    text, both 0 where it is nothing; and whether it is only the beginning, or the end.
    """

    tokens: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    is_cut: Flags


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
    rule: SplitByHash
    duplicates: Path | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    def selection(self, split: str, part: Part, documents: DocumentRange) -> Selection:
        """What the documents of a range give to the split."""
        heads, whole = self.rule.heads(part, documents), sizes(part, documents)
        start = documents.number + documents.first
        kept = ~dropped(self.duplicates, start, start + len(whole))
        is_cut = kept & (heads[:, 0] > 0) & (heads[:, 0] < whole[:, 0])
        tokens, text_bytes = (heads if split == "train" else whole - heads).T * kept
        # The beginning of a document that is cut gets an end-of-text token as well.
        return Selection(tokens + is_cut if split == "train" else tokens, text_bytes, is_cut)


def lay_out_shards(parts: list[Path], assembly: Assembly, shard_tokens: int) -> list[ShardLayout]:
    """The shards of both splits.

    A document is never divided: the one that brings a shard to `shard_tokens` closes it.
    """
    return [layout for split in SPLITS for layout in _lay_out_split(split, parts, assembly, shard_tokens)]


def _lay_out_split(split: str, parts: list[Path], assembly: Assembly, shard_tokens: int) -> Iterator[ShardLayout]:
    shard = filled = 0
    ranges: list[DocumentRange] = []
    for part, everything in numbered_parts(parts, assembly.dtype):
        selected = assembly.selection(split, part, everything).tokens
        mine = np.flatnonzero(selected)
        # Tokens of the split in this part, up to and with each of its documents. They increase, so
        # a binary search finds the document that fills a shard, in one step a shard instead of one
        # a document.
        ends = np.cumsum(selected[mine])
        # Of those documents `taken` are in shards already, with `begin` tokens.
        taken = begin = 0
        while taken < len(mine):
            stop = min(int(np.searchsorted(ends, begin + shard_tokens - filled)) + 1, len(mine))
            ranges.append(replace(everything, first=int(mine[taken]), stop=int(mine[stop - 1]) + 1))
            filled += int(ends[stop - 1]) - begin
            begin, taken = int(ends[stop - 1]), stop
            if filled >= shard_tokens:
                yield ShardLayout(split, shard, tuple(ranges))
                ranges, filled, shard = [], 0, shard + 1
    if ranges:
        yield ShardLayout(split, shard, tuple(ranges))


class Counts:
    """How often each token, and each pair of neighbouring tokens, occurs.

    int64 counts: `unigrams` (vocab_size,), and `bigrams` (vocab_size, vocab_size) or empty.

    With a `vocab_size` of 0 nothing is counted.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigrams = np.zeros(vocab_size, np.int64)
        small = vocab_size if vocab_size <= MAX_BIGRAM_VOCAB else 0
        self.bigrams = np.zeros((small, small), np.int64)
        # The last token of the ids before, which makes a pair with the first of the next.
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
        """Add the counts that `save` wrote."""
        saved = np.fromfile(path, dtype="<i8")
        self.unigrams += saved[: self.vocab_size]
        self.bigrams += saved[self.vocab_size :].reshape(self.bigrams.shape)


def write_shard(arguments: tuple[Assembly, ShardLayout]) -> Shard:
    """Write a shard, and next to the parts its token counts and its entry for the manifest."""
    assembly, layout = arguments
    final = assembly.folder / f"{layout.name}.bin"
    partial = assembly.folder / f"{layout.name}.bin.partial"
    tokens = documents = tails = text_bytes = 0
    content_hash = xxhash.xxh3_128()
    counts = Counts(assembly.vocab_size if layout.split == "train" else 0)
    with partial.open("wb") as file:
        for each in layout.ranges:
            part = Part(assembly.parts / each.part, assembly.dtype)
            selection = assembly.selection(layout.split, part, each)
            documents += int(np.count_nonzero(selection.tokens))
            text_bytes += int(selection.text_bytes.sum())
            tails += int(selection.is_cut.sum()) if layout.split == "val" else 0
            for ids in _copied(part, _token_ranges(layout.split, part.lengths[: each.stop], selection)):
                file.write(ids.data)
                content_hash.update(ids.data)
                counts.add(ids)
                tokens += len(ids)
                part.release_memory()  # else one long document would be in memory as a whole
    # The hash is of all that was written, so that `verify` finds damage that came afterwards.
    digest = content_hash.hexdigest()
    shard = Shard(
        file=final.name, tokens=tokens, documents=documents - tails, bytes=text_bytes, hash=digest, tails=tails
    )
    # Renamed last: `written_shard` takes the file of tokens as the sign that these two exist as
    # well.
    counts.save(assembly.parts / f"{layout.name}.counts")
    write_atomic(assembly.parts / f"{layout.name}.json", dump_json(asdict(shard)))
    publish(partial, final)
    return shard


def written_shard(assembly: Assembly, layout: ShardLayout) -> Shard | None:
    """The shard, if an earlier run has written it."""
    if not (assembly.folder / f"{layout.name}.bin").exists():
        return None
    return Shard(**parse_json((assembly.parts / f"{layout.name}.json").read_bytes()))


def _token_ranges(split: str, lengths: npt.NDArray[np.int64], selection: Selection) -> list[tuple[int, int]]:
    """Where in a part the selected tokens are, as [start, stop).

    `lengths` are the tokens of all documents in the part up to the last one of the selection.
    """
    stops = np.cumsum(lengths)[len(lengths) - len(selection.tokens) :]
    starts = stops - lengths[len(lengths) - len(selection.tokens) :]
    if split == "train":
        # The beginning of the document, and of one that is cut the end-of-text token at its end.
        ends = [starts, starts + selection.tokens - selection.is_cut, stops - selection.is_cut, stops]
    else:
        ends = [stops - selection.tokens, stops]
    pairs = np.stack(ends, axis=1).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    # Neighbours that are selected make one range.
    apart = pairs[1:, 0] != pairs[:-1, 1]
    begins, ends = pairs[np.append(True, apart)[: len(pairs)], 0], pairs[np.append(apart, True)[: len(pairs)], 1]
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


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
