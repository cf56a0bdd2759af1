"""`pipeline inspect`: what is in a dataset, a shard or a checkpoint, as tables or as JSON.

Counts, lengths and entropies are exact: every id is read once.
"""

import codecs
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.text import Text

from observe.quality import Sampled, describe_quality, show_quality
from observe.sample import NO_DOCUMENTS, documents_of, smallest
from observe.tables import cell, open_console, plain_table, print_json
from pipeline.budget import parameters
from pipeline.dataset.scan import Advance, DocumentFinder, Positions, blocks, each_shard, entropy_nats
from pipeline.dataset.shards import Manifest, Shard, check_sizes, map_shard, path_or_name, read_path
from pipeline.errors import UserError
from pipeline.log import ProgressReport
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer

BEGINNINGS = 3  # documents of which the beginning is shown
BEGINNING_IDS, BEGINNING_CHARACTERS = 200, 300
FREQUENT = 10  # tokens
SAMPLE_IDS = 8192  # of a sampled document: 4 million ids are decoded and looked at in 2 s
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


def run(path: Path, as_json: bool) -> None:
    """Write what is in `path` to stdout. Raises UserError for anything else than these three."""
    path = path_or_name(path)
    is_model = (path / "config.json").is_file() or any(path.glob("*.safetensors"))
    description = describe_model(path) if is_model else describe_dataset(path)
    (print_json if as_json else show)(description)


# ---- datasets and shards ----


@dataclass
class Counts:
    """What one pass over a split counts. Lengths of documents exclude end-of-text.

    `ids` (vocab_size + 1,): how often each id occurs, last those outside the vocabulary.
    `lengths`: documents by length; n ids have fewer than sqrt(2n) different ones, so it is small.
    A document that two shards share counts as two, but `prepare` splits none.
    `first`: shard, start and length of the first documents; `sample`: see `observe.sample`.
    """

    ids: npt.NDArray[np.int64]
    lengths: Counter[int] = field(default_factory=Counter)
    first: list[tuple[Shard, int, int]] = field(default_factory=list)
    sample: npt.NDArray[Any] = field(default_factory=NO_DOCUMENTS.copy)


def describe_dataset(path: Path) -> dict[str, Any]:
    """A dataset, or a single shard of one."""
    folder, manifest = read_path(path)
    check_sizes(folder, manifest)
    tokenizer, note = None, ""
    if manifest.is_foreign:
        note = f"{manifest.program}'s format, which names no vocabulary: assumed to be GPT-2's"
    # A lost vocabulary is no reason to hide the counts, which need none.
    try:
        tokenizer = from_spec(manifest.tokenizer, folder)
    except UserError as error:
        note = str(error)
    splits, counted = {}, count_splits(folder, manifest)
    for split, counts in counted.items():
        splits[split] = describe_counts(counts, tokenizer)
        splits[split]["shards"] = len(manifest.splits[split])
        splits[split]["beginnings"] = [describe_beginning(folder, manifest, found, tokenizer) for found in counts.first]
    recorded = (
        "program", "dtype", "end_of_text", "sources", "read", "passed_over", "options", "val_rule", "skipped", "unusual",
        "statistics",
    )  # fmt: skip
    identity = {"kind": "shard"} if path.is_file() else {"kind": "dataset", "fingerprint": manifest.fingerprint}
    described = {"path": str(path), **identity, "note": note, "tokenizer": vocabulary(manifest.tokenizer)}
    described |= {name: getattr(manifest, name) for name in recorded} | {"splits": splits}
    split = "train" if "train" in splits else next(iter(splits))
    if tokenizer is None:
        return described
    sample = read_sample(folder, manifest, split, counts=counted[split], tokenizer=tokenizer)
    return described | {"quality": describe_quality(split, sample, splits[split]["documents"])}


def read_sample(folder: Path, manifest: Manifest, split: str, counts: Counts, tokenizer: Tokenizer) -> list[Sampled]:
    """The sampled documents that the vocabulary can decode, of long ones the beginning."""
    sample = []
    for _, key, number, start, length in counts.sample.tolist():
        shard = manifest.splits[split][number]
        ids = map_shard(folder, manifest, shard)[start : start + min(length, SAMPLE_IDS)].tolist()
        if (text := decode(tokenizer, ids)) is not None:
            sample.append(Sampled(shard.file, start, text, key))
    return sample


def vocabulary(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's spec without the vocabulary itself."""
    return {key: spec[key] for key in ("name", "vocab_size", "end_of_text", "fingerprint") if key in spec}


def count_splits(folder: Path, manifest: Manifest) -> dict[str, Counts]:
    """Read every id of every split."""
    tokens = sum(shard.tokens for shard in manifest.shards)
    splits = {}
    with ProgressReport("inspect", tokens * np.dtype(manifest.dtype).itemsize / 1e6, "MB") as report:
        for split, shards in manifest.splits.items():
            splits[split] = counts = Counts(np.zeros(manifest.tokenizer["vocab_size"] + 1, dtype=np.int64))
            for found in each_shard(shards, report, partial(count_shard, folder, manifest, shards)):
                counts.ids += found.ids
                counts.lengths.update(found.lengths)
                counts.first = [*counts.first, *found.first][:BEGINNINGS]
                counts.sample = smallest(counts.sample, found.sample)
    return splits


def count_shard(folder: Path, manifest: Manifest, shards: list[Shard], shard: Shard, advance: Advance) -> Counts:
    """Read every id of one of a split's shards."""
    vocab_size, number = manifest.tokenizer["vocab_size"], shards.index(shard)
    counts, finder = Counts(np.zeros(vocab_size + 1, dtype=np.int64)), DocumentFinder(manifest)

    def add_documents(starts: Positions, lengths: Positions) -> None:
        # Millions of documents have a few thousand lengths: counted in numpy, added in Python.
        different, times = np.unique(lengths, return_counts=True)
        counts.lengths.update(dict(zip(different.tolist(), times.tolist(), strict=True)))
        # Mapped anew for each block: one mapping of a large shard would keep all pages in memory.
        mapped: TokenIds = np.asarray(map_shard(folder, manifest, shard))
        counts.sample = smallest(counts.sample, documents_of(number, mapped, starts, lengths))
        missing = BEGINNINGS - len(counts.first)
        counts.first += [
            (shard, *found) for found in zip(starts[:missing].tolist(), lengths[:missing].tolist(), strict=True)
        ]

    for block in blocks(folder / shard.file, manifest.header_bytes):
        ids: TokenIds = np.frombuffer(block, manifest.dtype)
        # Clipped as uint32, which every id fits into, at half the memory of int64.
        counts.ids += np.bincount(np.minimum(ids, np.uint32(vocab_size)), minlength=vocab_size + 1)
        add_documents(*finder.feed(ids))
        advance(len(block))
    start, length = finder.rest()
    if length:  # the last document of a foreign shard may lack its end-of-text
        add_documents(np.array([start]), np.array([length]))
    return counts


def describe_counts(counts: Counts, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A split's figures, without those that need the vocabulary if there is none."""
    inside = counts.ids[:-1]
    tokens, used = int(counts.ids.sum()), np.flatnonzero(inside)
    described: dict[str, Any] = {
        "tokens": tokens,
        "documents": counts.lengths.total(),
        "document_lengths": describe_lengths(counts.lengths),
        "distinct_ids": len(used),
        "highest_id": int(used[-1]) if len(used) else None,
        "ids_outside_vocabulary": int(counts.ids[-1]),
        "unigram_entropy_nats": entropy_nats(inside),
    }
    token_bytes = tokenizer.token_bytes() if tokenizer else None
    if token_bytes is not None:
        text_bytes = int(inside @ token_bytes)
        described |= {"bytes": text_bytes, "bytes_per_token": text_bytes / max(tokens, 1)}
    described["frequent_tokens"] = [
        {"id": i, "text": decode(tokenizer, [i], is_complete=True), "share": float(inside[i] / tokens)}
        for i in np.argsort(-inside, kind="stable")[: min(FREQUENT, len(used))].tolist()
    ]
    return described


def describe_lengths(lengths: Counter[int]) -> dict[str, float]:
    """Statistics of documents from the number of documents of each length."""
    values = np.array(sorted(lengths))
    # A quantile is the first length up to which enough documents are counted.
    upto = np.cumsum([lengths[value] for value in values.tolist()])
    if not len(values):
        return {}
    quantiles = {name: int(values[np.searchsorted(upto, share * upto[-1])]) for name, share in QUANTILES.items()}
    mean = sum(length * times for length, times in lengths.items()) / lengths.total()
    return {"min": int(values[0]), **quantiles, "max": int(values[-1]), "mean": mean}


def describe_beginning(
    folder: Path, manifest: Manifest, document: tuple[Shard, int, int], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A document's first ids and text; `text` is None if the vocabulary cannot decode them."""
    shard, start, length = document
    ids = map_shard(folder, manifest, shard)[start : start + min(length, BEGINNING_IDS)].tolist()
    text = decode(tokenizer, ids)
    beginning = {"file": shard.file, "position": start, "tokens": length, "ids": ids[:FREQUENT]}
    return beginning | {"text": text and text[:BEGINNING_CHARACTERS]}


def decode(tokenizer: Tokenizer | None, ids: list[int], is_complete: bool = False) -> str | None:
    """The text of `ids`, None without a vocabulary that has them.

    Unless the text is complete, a truncated character at its end is omitted.
    """
    if tokenizer is None or max(ids, default=0) >= tokenizer.vocab_size:
        return None
    content = tokenizer.decode_bytes(ids)
    # The incremental decoder holds back an incomplete character unless told that this is the end.
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content, is_complete)


# ---- checkpoints ----


def describe_model(folder: Path) -> dict[str, Any]:
    """A checkpoint, or a Hugging Face folder of a model."""
    from pipeline.checkpoint.open import open_model

    found = open_model(folder, verify=False)
    spec = found.tokenizer.spec()
    described: dict[str, Any] = {"path": str(folder), "kind": "Hugging Face folder"}
    if saved := found.description:
        recorded = ("step", "tokens", "val_loss", "averaged", "program", "dataset", "config")
        described |= {"kind": "checkpoint", **{name: getattr(saved, name) for name in recorded}}
    else:
        described["config"] = {"model": asdict(found.config)}
    described["parameters"] = parameters(found.config, spec["vocab_size"])
    described["tokenizer"] = vocabulary(spec)
    described["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return described


# ---- on the terminal ----


def show(description: dict[str, Any]) -> None:
    """A table of facts, one of all splits' figures, then frequent tokens and beginnings of each."""
    console = open_console()
    splits: dict[str, dict[str, Any]] = description.get("splits", {})
    config: dict[str, dict[str, Any]] = description.get("config", {})
    facts, figures = plain_table(), plain_table("", *splits)
    for name, value in {**description, **config}.items():
        if name not in ("splits", "config", "quality") and value not in ({}, [], "", None):
            facts.add_row(cell(name), cell(value))
    columns = [
        {name: value for name, value in split.items() if not isinstance(value, dict | list)}
        | {f"document length, {name}": value for name, value in split["document_lengths"].items()}
        for split in splits.values()
    ]
    for name in dict.fromkeys(name for column in columns for name in column):
        figures.add_row(name, *(cell(column.get(name, "")) for column in columns))
    console.print(*((facts, "", figures) if splits else (facts,)), sep="\n")
    for name, split in splits.items():
        tokens = (
            f"{token['id'] if token['text'] is None else repr(token['text'])} {token['share']:.1%}"
            for token in split["frequent_tokens"]
        )
        console.print(Text(f"\n{name}, frequent tokens: {', '.join(tokens)}"))
        for number, beginning in enumerate(split["beginnings"], start=1):
            text = beginning["ids"] if beginning["text"] is None else beginning["text"]
            console.print(Text(f"\n{name}, document {number} of {beginning['tokens']:,} tokens: "), cell(text), sep="")
    if "quality" in description:
        show_quality(console, description["quality"])
