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

from pipeline.dataset.scan import entropy_nats
from pipeline.dataset.shards import SPLITS, Shard
from pipeline.files import publish, write_atomic
from pipeline.vocabulary.tokenizer import TokenIds, token_dtype
from prepare.assembly.counts import Counts
from prepare.assembly.splits import TOKENS_AT_ONCE, SplitRule, dropped
from prepare.unfinished.parts import Part


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
