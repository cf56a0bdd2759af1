"""A prepared dataset on disk: shards of bare token ids, and the manifest that says what they are.

    data/<name>/train_00000.bin ...   little-endian ids, no header: np.memmap(file, dtype=np.uint16) reads one
    data/<name>/val_00000.bin ...
    data/<name>/manifest.json         written last; a folder without it is not a dataset

Documents follow each other, each ended by the end-of-text id. A document is never cut: a shard is closed by the document
that fills it, so every shard ends with end-of-text.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from pipeline.errors import UserError
from pipeline.files import hash_bytes, write_atomic
from pipeline.tokenizer import token_dtype

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Shard:
    """One file of token ids. `bytes` counts the UTF-8 text it was made from; `hash` is XXH3-128 of the file."""

    file: str
    tokens: int
    documents: int
    bytes: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """Everything a reader of the shards has to know, and where they came from."""

    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[str, list[Shard]]
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    val_rule: dict[str, Any]
    skipped: dict[str, dict[str, Any]]
    unusual: dict[str, dict[str, Any]]
    statistics: dict[str, Any]
    program: str
    format: int = FORMAT_VERSION
    end_of_text: str = field(default="after each document")

    @property
    def fingerprint(self) -> str:
        """Names the content: equal fingerprints mean the same tokens in the same order under the same vocabulary."""
        shards = {split: [shard.hash for shard in shards] for split, shards in self.splits.items()}
        content = {"tokenizer": self.tokenizer, "dtype": self.dtype, "shards": shards}
        return hash_bytes(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))

    def count(self, split: str, what: str) -> int:
        """The sum over a split's shards of `what`: tokens, documents or bytes."""
        return sum(getattr(shard, what) for shard in self.splits[split])

    def save(self, folder: Path) -> None:
        write_atomic(folder / MANIFEST_NAME, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared dataset. Raises UserError where the folder is missing, not whole, or written otherwise."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"no dataset at {folder}: prepare one with `pipeline prepare SOURCE --name {folder.name}`")
    if not path.is_file():
        raise UserError(
            f"{folder} is not a whole dataset: it has no {MANIFEST_NAME}, so its preparation did not finish; "
            "run the same `pipeline prepare` command again"
        )
    try:
        document = orjson.loads(path.read_bytes())
        if document["format"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {document['format']}, this program reads {FORMAT_VERSION}: prepare it again"
            )
        shards = document.pop("splits")
        splits = {split: [Shard(**shard) for shard in shards[split]] for split in SPLITS}
        manifest = Manifest(splits=splits, **document)
        _check_shards(folder, manifest)
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): prepare the dataset again with --force"
        ) from None
    return manifest


def _check_shards(folder: Path, manifest: Manifest) -> None:
    vocab_size = manifest.tokenizer["vocab_size"]
    wanted = token_dtype(vocab_size)
    if manifest.dtype != wanted.name:
        raise UserError(
            f"{folder} holds {manifest.dtype} ids, but a vocabulary of {vocab_size} needs {wanted.name}: prepare it again"
        )
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        path = folder / shard.file
        if Path(shard.file).name != shard.file:
            raise UserError(f"{folder / MANIFEST_NAME} names a shard outside its folder: {shard.file!r}")
        found = path.stat().st_size if path.is_file() else None
        if found != shard.tokens * wanted.itemsize:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"{path} {state}, the manifest wants {shard.tokens * wanted.itemsize} bytes: "
                "restore it, or prepare again with --force"
            )


class TokenReader:
    """A split's shards as one flat array of ids, memory-mapped: nothing is read until it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        shards = manifest.splits[split]
        dtype = token_dtype(manifest.tokenizer["vocab_size"])
        self._maps = [np.memmap(folder / shard.file, dtype=dtype, mode="r") for shard in shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self.vocab_size: int = manifest.tokenizer["vocab_size"]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids [start, stop) of the split, across shard borders. Raises UserError for an id outside the vocabulary."""
        parts, at = [], start
        while at < stop:
            shard = self._shard_of(at)
            end = min(stop, int(self._starts[shard + 1]))
            parts.append(self._maps[shard][at - self._starts[shard] : end - self._starts[shard]])
            at = end
        ids = np.concatenate(parts).astype(np.int64)
        if ids.size and ids.max() >= self.vocab_size:
            file = self._maps[self._shard_of(start + int(ids.argmax()))].filename
            raise UserError(
                f"{file} holds id {ids.max()}, but its vocabulary has {self.vocab_size}: "
                "the file is damaged; prepare the dataset again with --force"
            )
        return ids

    def _shard_of(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1
