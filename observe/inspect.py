"""`pipeline inspect`: what is in a dataset, a shard or a checkpoint, as tables or as one JSON object.

Counts, lengths and entropies are exact: every id is read once. What comes out of files is shown with its control characters
escaped, so that no text can reach the terminal as a command.
"""

import codecs
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.dataset.scan import Advance, DocumentFinder, blocks, each_shard, entropy_nats
from pipeline.dataset.shards import Manifest, Shard, check_sizes, map_shard, read_path
from pipeline.errors import UserError
from pipeline.log import ProgressReport, printable
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import TokenIds, Tokenizer

BEGINNINGS = 3
BEGINNING_IDS, BEGINNING_CHARACTERS = 200, 300
FREQUENT = 10
LISTED = 3
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
FILE_WIDTH = 120  # of tables whose width no terminal sets


def run(path: Path, as_json: bool) -> None:
    """Write what is in `path` to stdout. Raises UserError for what is neither dataset, shard nor checkpoint."""
    is_model = (path / "config.json").is_file() or any(path.glob("*.safetensors"))
    description = describe_model(path) if is_model else describe_dataset(path)
    if as_json:
        sys.stdout.write(json.dumps(description) + "\n")
    else:
        show(description)


# ---- datasets and shards ----


@dataclass
class Counts:
    """What one pass over a split's ids counts: each id, and documents by length, which is their ids without end-of-text.

    `ids` has one place more than the vocabulary, for what lies outside it. n ids hold fewer than sqrt(2n) different lengths,
    so `lengths` stays small. A document that a shard's border cuts counts by its parts; `prepare` cuts none.
    """

    ids: npt.NDArray[np.int64]
    lengths: Counter[int] = field(default_factory=Counter)
    first: list[tuple[Shard, int, int]] = field(default_factory=list)  # of some documents: shard, start and length


def describe_dataset(path: Path) -> dict[str, Any]:
    """A dataset, or a single shard of one."""
    folder, manifest = read_path(path)
    check_sizes(folder, manifest)
    tokenizer, note = None, ""
    if manifest.is_foreign:
        note = f"read as {manifest.program}'s format and GPT-2's vocabulary: nothing in the files says more"
    try:
        tokenizer = from_spec(manifest.tokenizer, folder)
    except UserError as error:
        note = str(error)
    splits = {}
    for split, counts in count_splits(folder, manifest).items():
        splits[split] = describe_counts(counts, tokenizer)
        splits[split]["shards"] = len(manifest.splits[split])
        splits[split]["beginnings"] = [
            describe_beginning(folder, manifest, document, tokenizer) for document in counts.first
        ]
    told = ("program", "dtype", "end_of_text", "sources", "options", "val_rule", "skipped", "unusual", "statistics")
    identity = {"kind": "shard"} if path.is_file() else {"kind": "dataset", "fingerprint": manifest.fingerprint}
    return {
        "path": str(path),
        **identity,
        "note": note,
        "tokenizer": vocabulary(manifest.tokenizer),
        **{name: getattr(manifest, name) for name in told},
        "splits": splits,
    }


def vocabulary(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's spec without the vocabulary itself."""
    return {key: spec[key] for key in ("name", "vocab_size", "end_of_text", "fingerprint") if key in spec}


def count_splits(folder: Path, manifest: Manifest) -> dict[str, Counts]:
    """Read every id of every split."""
    tokens = sum(shard.tokens for shards in manifest.splits.values() for shard in shards)
    splits = {}
    with ProgressReport("inspect", tokens * np.dtype(manifest.dtype).itemsize / 1e6, "MB") as report:
        for split, shards in manifest.splits.items():
            splits[split] = counts = Counts(np.zeros(manifest.tokenizer["vocab_size"] + 1, dtype=np.int64))
            for found in each_shard(shards, report, partial(count_shard, folder, manifest)):
                counts.ids += found.ids
                counts.lengths.update(found.lengths)
                counts.first = [*counts.first, *found.first][:BEGINNINGS]
    return splits


def count_shard(folder: Path, manifest: Manifest, shard: Shard, advance: Advance) -> Counts:
    """Read every id of a shard."""
    vocab_size = manifest.tokenizer["vocab_size"]
    counts, finder = Counts(np.zeros(vocab_size + 1, dtype=np.int64)), DocumentFinder(manifest)
    places: list[tuple[int, int]] = []
    for block in blocks(folder / shard.file, manifest.header_bytes):
        ids: TokenIds = np.frombuffer(block, manifest.dtype)
        counts.ids += np.bincount(np.minimum(ids, np.uint32(vocab_size)), minlength=vocab_size + 1)
        starts, lengths = finder.feed(ids)
        different, times = np.unique(lengths, return_counts=True)
        counts.lengths.update(dict(zip(different.tolist(), times.tolist(), strict=True)))
        wanted = BEGINNINGS - len(places)
        places += zip(starts[:wanted].tolist(), lengths[:wanted].tolist(), strict=True)
        advance(len(block))
    start, length = finder.rest()
    if length:
        counts.lengths[length] += 1
        places.append((start, length))
    counts.first = [(shard, *place) for place in places[:BEGINNINGS]]
    return counts


def describe_counts(counts: Counts, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A split's figures; those that need the vocabulary are left out where there is none."""
    inside = counts.ids[:-1]
    tokens, there = int(counts.ids.sum()), np.flatnonzero(inside)
    described: dict[str, Any] = {
        "tokens": tokens,
        "documents": counts.lengths.total(),
        "document_lengths": describe_lengths(counts.lengths),
        "distinct_ids": len(there),
        "highest_id": int(there[-1]) if len(there) else None,
        "ids_outside_vocabulary": int(counts.ids[-1]),
        "unigram_entropy_nats": entropy_nats(inside),
    }
    token_bytes = tokenizer.token_bytes() if tokenizer else None
    if token_bytes is not None:
        text_bytes = int(inside @ token_bytes)
        described |= {"bytes": text_bytes, "bytes_per_token": text_bytes / tokens}
    described["frequent_tokens"] = [
        {"id": i, "text": decode(tokenizer, [i], whole=True), "share": float(inside[i] / tokens)}
        for i in np.argsort(-inside, kind="stable")[: min(FREQUENT, len(there))].tolist()
    ]
    return described


def describe_lengths(lengths: Counter[int]) -> dict[str, float]:
    """Of documents, from how many there are of each length."""
    values = np.array(sorted(lengths))
    upto = np.cumsum([lengths[value] for value in values.tolist()])
    if not len(values):
        return {}
    quantiles = {name: int(values[np.searchsorted(upto, share * upto[-1])]) for name, share in QUANTILES.items()}
    mean = sum(length * times for length, times in lengths.items()) / lengths.total()
    return {"min": int(values[0]), **quantiles, "max": int(values[-1]), "mean": mean}


def describe_beginning(
    folder: Path, manifest: Manifest, document: tuple[Shard, int, int], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """How a document begins; `text` is None where its ids are no text in this vocabulary."""
    shard, start, length = document
    ids = map_shard(folder, manifest, shard)[start : start + min(length, BEGINNING_IDS)].tolist()
    text = decode(tokenizer, ids)
    shown = None if text is None else text[:BEGINNING_CHARACTERS]
    return {"file": shard.file, "position": start, "tokens": length, "ids": ids[:FREQUENT], "text": shown}


def decode(tokenizer: Tokenizer | None, ids: list[int], whole: bool = False) -> str | None:
    """The text of `ids`; of one that goes on, without a character cut at the end. None where the ids have no text."""
    if tokenizer is None or max(ids, default=0) >= tokenizer.vocab_size:
        return None
    content = tokenizer.decode_bytes(ids)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(content, whole)


# ---- checkpoints ----


def describe_model(folder: Path) -> dict[str, Any]:
    """A checkpoint of this program, or a Hugging Face GPT-2 folder."""
    import torch

    from pipeline.checkpoint.open import open_model
    from pipeline.model.language_model import LanguageModel

    found = open_model(folder, verify=False)
    spec = found.tokenizer.spec()
    described: dict[str, Any] = {"path": str(folder), "kind": "Hugging Face GPT-2 folder"}
    if saved := found.description:
        told = ("step", "tokens", "val_loss", "program", "dataset", "config")
        described |= {"kind": "checkpoint", **{name: getattr(saved, name) for name in told}}
    else:
        described["config"] = {"model": asdict(found.config)}
    with torch.device("meta"):
        described["parameters"] = LanguageModel(found.config, found.tokenizer.vocab_size).parameter_count()
    described["tokenizer"] = vocabulary(spec)
    described["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return described


# ---- on the terminal ----


def show(description: dict[str, Any]) -> None:
    """The description as tables."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    splits: dict[str, dict[str, Any]] = description.get("splits", {})
    config: dict[str, dict[str, Any]] = description.get("config", {})
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {**description, **config}.items():
        if name not in ("splits", "config") and value not in ({}, [], "", None):
            facts.add_row(cell(name), cell(value))
    console.print(facts)
    if splits:
        show_splits(console, splits)


def show_splits(console: Console, splits: dict[str, dict[str, Any]]) -> None:
    """Their figures side by side, then what is in them."""
    figures = Table("", *splits, box=None, pad_edge=False)
    columns = [
        {name: value for name, value in split.items() if not isinstance(value, dict | list)}
        | {f"document length, {name}": value for name, value in split["document_lengths"].items()}
        for split in splits.values()
    ]
    for name in dict.fromkeys(name for column in columns for name in column):
        figures.add_row(name, *(cell(column.get(name, "")) for column in columns))
    console.print("", figures, sep="\n")
    for name, split in splits.items():
        tokens = (
            f"{token['id'] if token['text'] is None else repr(token['text'])} {token['share']:.1%}"
            for token in split["frequent_tokens"]
        )
        console.print(Text(f"\n{name}, frequent tokens: {', '.join(tokens)}"))
        for number, beginning in enumerate(split["beginnings"], start=1):
            text = beginning["ids"] if beginning["text"] is None else beginning["text"]
            console.print(Text(f"\n{name}, document {number} of {beginning['tokens']:,} tokens: "), cell(text), sep="")


def cell(value: Any) -> Text:
    """A value as a cell of a table, never as markup."""
    return Text(printable(in_words(value)))


def in_words(value: Any) -> str:
    """A value on one line."""
    match value:
        case dict():
            return ", ".join(f"{name} {in_words(entry)}" for name, entry in value.items())
        case list():
            more = f" and {len(value) - LISTED:,} more" if len(value) > LISTED else ""
            return "; ".join(in_words(entry) for entry in value[:LISTED]) + more
        case bool() | None:
            return str(value).lower()
        case float():
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
    return str(value)
