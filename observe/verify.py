"""`pipeline verify`: every promise of a dataset's manifest, or of a checkpoint's description, held against the files.

    each shard, once, in blocks   size, hash, ids below the vocabulary's size, end-of-text at its end, documents, bytes
    val, then train               no document in both

All faults are told, one line each with the shard and the position. Nothing is changed.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from observe.shared_documents import DocumentIndex
from pipeline.dataset.scan import Advance, DocumentFinder, Positions, blocks, each_shard
from pipeline.dataset.shards import MANIFEST_NAME, SPLITS, Manifest, Shard, map_shard, read_path, size_fault
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.log import ProgressReport, printable
from pipeline.vocabulary.specs import from_spec, vocabulary_file
from pipeline.vocabulary.tokenizer import TokenIds

_LISTED_FILES = 5


def run(path: Path) -> None:
    """Verify a dataset, a shard or a checkpoint; remarks, faults and the verdict go to stdout. Raises UserError if faulty."""
    if any(path.glob("*.safetensors")):
        _verify_checkpoint(path)
        return
    folder, manifest = read_path(path)
    check = DatasetCheck(folder, manifest)
    check.run()
    for kind, lines in (("remark", check.remarks), ("fault", check.faults)):
        for line in lines:
            sys.stdout.write(f"{kind}: {printable(line)}\n")
    sys.stdout.flush()
    if check.faults:
        raise UserError(f"{path} has {len(check.faults)} fault(s), listed above: {manifest.remedy}")
    sys.stdout.write(f"verified: {path}: {check.verdict()}\n")


def _verify_checkpoint(folder: Path) -> None:
    from pipeline.checkpoint.folder import read_description, verify_files

    description = read_description(folder)
    verify_files(folder, description)
    sys.stdout.write(
        f"verified: {folder}: step {description.step}, {len(description.files)} files match their hashes\n"
    )


@dataclass
class Tally:
    """What the pass over one shard found. `unreadable` says why there was none; `twins` are documents that val has too."""

    unreadable: str = ""
    hash: str = ""
    documents: int = 0
    text_bytes: int = 0
    last_id: int = -1
    outside: int = 0
    first_outside: tuple[int, int] = (0, 0)  # position, id
    twins: int = 0
    first_twin: str = ""


class DatasetCheck:
    """One dataset, or one shard of it, under examination; `faults` and `remarks` are lines for the user."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.faults: list[str] = []
        self.remarks: list[str] = []
        self.documents = 0
        self.vocab_size: int = manifest.tokenizer["vocab_size"]
        self.end_of_text: int = manifest.tokenizer["end_of_text"]
        self.shards = [shard for shards in manifest.splits.values() for shard in shards]
        self.file_of_hash = {shard.hash: shard.file for shard in self.shards}
        self.token_bytes: npt.NDArray[np.int64] | None = None
        # A lone document is cut in two: its halves may well be equal, and no document is in both splits.
        compared = set(SPLITS) <= manifest.splits.keys() and manifest.val_rule.get("kind") != "position"
        self.val_documents = DocumentIndex() if compared else None

    def run(self) -> None:
        """Look at everything once; fills `faults` and `remarks`."""
        self._check_surroundings()
        size = sum(shard.tokens for shard in self.shards) * np.dtype(self.manifest.dtype).itemsize
        tallies: dict[str, list[Tally]] = {}
        with ProgressReport("verify", size / 1e6, "MB") as report:
            for split in sorted(self.manifest.splits, key=lambda split: split != "val"):
                tallies[split] = list(each_shard(self.manifest.splits[split], report, partial(self._tally, split)))
                if split == "val" and self.val_documents:
                    self.val_documents.sort()
        for split, shards in self.manifest.splits.items():
            for shard, tally in zip(shards, tallies[split], strict=True):
                self.documents += tally.documents
                self._judge(shard, tally)

    def verdict(self) -> str:
        """What was looked at and found true."""
        found = [f"every id is below {self.vocab_size:,}"]
        if not self.manifest.is_foreign:
            found += ["sizes, hashes and counts are the manifest's", "every shard ends with end-of-text"]
        if self.val_documents and self.documents:
            found.append("no document is in both splits")
        tokens = sum(shard.tokens for shard in self.shards)
        return f"{tokens:,} tokens, {self.documents:,} documents in {len(self.shards)} shard(s); {', '.join(found)}"

    def _check_surroundings(self) -> None:
        """The vocabulary, and files that the manifest does not name."""
        if self.manifest.is_foreign:
            self.remarks.append(
                f"{self.manifest.program} keeps no hashes: damage that leaves ids in the vocabulary is not seen"
            )
            return
        try:
            self.token_bytes = from_spec(self.manifest.tokenizer, self.folder).token_bytes()
        except UserError as error:
            self.faults.append(str(error))
        vocabulary = vocabulary_file(self.manifest.tokenizer["name"])
        known = {MANIFEST_NAME, vocabulary, *(shard.file for shard in self.shards)}
        strays = sorted(path.name for path in self.folder.iterdir() if path.name not in known and path.name[0] != ".")
        if strays and set(SPLITS) <= self.manifest.splits.keys():
            more = f" and {len(strays) - _LISTED_FILES} more" if len(strays) > _LISTED_FILES else ""
            self.remarks.append(f"not named by the manifest: {', '.join(strays[:_LISTED_FILES])}{more}")

    def _tally(self, split: str, shard: Shard, advance: Advance) -> Tally:
        path = self.folder / shard.file
        try:
            if fault := size_fault(self.folder, self.manifest, shard):
                return Tally(unreadable=f"{path} {fault}", hash=hash_file(path) if path.is_file() else "")
            return self._scan(split, shard, advance)
        except OSError as error:
            return Tally(unreadable=f"{path} cannot be read: {error.strerror}")

    def _scan(self, split: str, shard: Shard, advance: Advance) -> Tally:
        tally, hash_, finder = Tally(), xxhash.xxh3_128(), DocumentFinder(self.manifest)
        for block in blocks(self.folder / shard.file, self.manifest.header_bytes):
            hash_.update(block)
            part: TokenIds = np.frombuffer(block, self.manifest.dtype)
            if part.max() >= self.vocab_size:
                outside = np.flatnonzero(part >= self.vocab_size)
                if not tally.outside:
                    tally.first_outside = finder.position + int(outside[0]), int(part[outside[0]])
                tally.outside += len(outside)
            if self.token_bytes is not None:
                tally.text_bytes += int(self.token_bytes.take(part, mode="clip").sum())
            self._compare(split, shard, finder.feed(part), tally)
            tally.last_id = int(part[-1])
            advance(len(block))
        tally.hash, tally.documents = hash_.hexdigest(), finder.count
        return tally

    def _compare(self, split: str, shard: Shard, documents: tuple[Positions, Positions], tally: Tally) -> None:
        """Keep val's documents, look for train's among them; a document that a shard's border cuts is left out."""
        starts, lengths = (positions[documents[1] > 0] for positions in documents)
        if self.val_documents is None or not len(starts):
            return
        # Mapped anew for each block: one mapping of a large shard would hold all of its pages in memory in the end.
        ids: TokenIds = np.asarray(map_shard(self.folder, self.manifest, shard))
        if split == "val":
            self.val_documents.add(shard.file, ids, starts, lengths)
            return
        for start, twin in self.val_documents.find(ids, starts, lengths):
            if not tally.twins:
                tally.first_twin = f"of {twin.length} ids at position {start} is in {twin.file} too, at {twin.start}"
            tally.twins += 1

    def _judge(self, shard: Shard, tally: Tally) -> None:
        path, ours = self.folder / shard.file, not self.manifest.is_foreign
        if ours and tally.hash != shard.hash and tally.hash in self.file_of_hash:
            self.faults.append(f"{path} holds what the manifest says of {self.file_of_hash[tally.hash]}: a wrong name")
            return
        if tally.unreadable:
            self.faults.append(tally.unreadable)
            return
        if ours and tally.hash != shard.hash:
            self.faults.append(f"{path} has the hash {tally.hash}, the manifest wants {shard.hash}")
        if tally.outside:
            position, found = tally.first_outside
            self.faults.append(
                f"{path} holds {tally.outside:,} id(s) outside the vocabulary of {self.vocab_size:,}; "
                f"the first, at position {position}, is {found}"
            )
        for what, found, wanted in (
            ("documents", tally.documents, shard.documents),
            ("bytes of text", tally.text_bytes, shard.bytes if self.token_bytes is not None else None),
        ):
            if wanted is not None and found != wanted:
                self.faults.append(f"{path} holds {found} {what}, the manifest wants {wanted}")
        if tally.last_id != self.end_of_text and self.manifest.end_of_text == "after each document":
            line = (
                f"{path} does not end with end-of-text: its last id, at position {shard.tokens - 1}, is {tally.last_id}"
            )
            (self.faults if ours else self.remarks).append(line)
        if tally.twins:
            more = f"; and {tally.twins - 1:,} more of this shard" if tally.twins > 1 else ""
            self.faults.append(f"{path} is in both splits: the document {tally.first_twin}{more}")
