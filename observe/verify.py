"""`pipeline verify`: the files against a dataset's manifest, or against a checkpoint's description.

    each shard, once, in blocks   size, hash, ids below the vocabulary size, documents, bytes,
                                  end-of-text at its end
    val, then train               no document in both

All faults are reported, one line each with the shard and the position. Nothing is changed.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from observe.tables import format_list
from pipeline.dataset.scan import Advance, DocumentFinder, Positions, blocks, each_shard
from pipeline.dataset.shards import (
    LISTING_NAME,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Shard,
    map_shard,
    path_or_name,
    read_path,
    size_fault,
)
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.log import ProgressReport, printable
from pipeline.vocabulary.specs import from_spec, vocabulary_file
from pipeline.vocabulary.tokenizer import TokenIds


def run(path: Path) -> None:
    """Write faults and remarks, or the verdict, to stdout. Raises UserError for faults."""
    path = path_or_name(path)
    # Datasets are verified without importing torch, which takes seconds.
    if any(path.glob("*.safetensors")):
        _verify_checkpoint(path)
        return
    verification = Verification(*read_path(path))
    verification.run()
    for kind, lines in (("remark", verification.remarks), ("fault", verification.faults)):
        for line in lines:
            sys.stdout.write(f"{kind}: {printable(line)}\n")
    sys.stdout.flush()
    if verification.faults:
        raise UserError(f"{path} has {len(verification.faults)} fault(s), listed above: {verification.manifest.remedy}")
    sys.stdout.write(f"verified: {path}: {verification.verdict()}\n")


def _verify_checkpoint(folder: Path) -> None:
    from pipeline.checkpoint.folder import DESCRIPTION, read_description, verify_files

    description = read_description(folder)
    verify_files(folder, description)
    strays = sorted(path.name for path in folder.iterdir() if path.name not in (*description.files, DESCRIPTION))
    if strays:  # such as the README.md of an exported model, which its owner may edit
        sys.stdout.write(f"remark: not in {DESCRIPTION}: {printable(format_list(strays))}\n")
    sys.stdout.write(f"verified: {folder}: step {description.step}, hashes of {len(description.files)} files match\n")


class Document(NamedTuple):
    """A document's position and length in its shard, in ids, without end-of-text."""

    file: str
    start: int
    length: int


@dataclass
class Tally:
    """What the pass over one shard found; `unreadable` is the reason if there was none.

    `outside`: ids outside the vocabulary. `seen`: val's documents by a hash of their ids; `twins`:
    documents of train that are among them.
    """

    unreadable: str = ""
    hash: str = ""
    documents: int = 0
    text_bytes: int = 0
    last_id: int = -1
    outside: int = 0
    first_outside: str = ""
    seen: dict[bytes, Document] = field(default_factory=dict)
    twins: int = 0
    first_twin: str = ""


class Verification:
    """Of one dataset, or one shard of it. `faults` and `remarks` are lines for the user."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.faults: list[str] = []
        self.remarks: list[str] = []
        self.documents = 0
        self.vocab_size: int = manifest.tokenizer["vocab_size"]
        self.end_of_text: int = manifest.tokenizer["end_of_text"]
        self.shards = manifest.shards
        self.file_of_hash = {shard.hash: shard.file for shard in self.shards}
        self.token_bytes: npt.NDArray[np.int64] | None = None
        # Different texts have different ids in GPT-2's vocabulary, which is assumed of foreign shards.
        self.keeps_text = manifest.is_foreign
        # Where documents are split, the end of one may be equal to another document.
        self.compares = all(map(manifest.splits.get, SPLITS)) and manifest.val_rule.get("kind") != "position"
        self.val_documents: dict[bytes, Document] = {}

    def run(self) -> None:
        """Read everything once; fills `faults` and `remarks`."""
        self._verify_folder()
        size = sum(shard.tokens for shard in self.shards) * np.dtype(self.manifest.dtype).itemsize
        tallies: dict[str, list[Tally]] = {}
        with ProgressReport("verify", size / 1e6, "MB") as report:
            # val first: it has fewer documents to keep in memory, among which train's are looked up.
            for split in sorted(self.manifest.splits, key=lambda split: split != "val"):
                tallies[split] = list(each_shard(self.manifest.splits[split], report, partial(self._tally, split)))
                for tally in reversed(tallies[split]):  # of equal documents the first one is reported
                    self.val_documents |= tally.seen
        for split, shards in self.manifest.splits.items():
            for shard, tally in zip(shards, tallies[split], strict=True):
                self.documents += tally.documents - shard.tails
                self._report(shard, tally)
        if self.manifest.read and set(SPLITS) <= self.manifest.splits.keys():
            self._report_sources()

    def _report_sources(self) -> None:
        """What was counted while the sources were read against what the manifest says of the shards."""
        counts = ("rows", "documents", "text_bytes")
        rows, documents, text_bytes = (sum(source[what] for source in self.manifest.read) for what in counts)
        skipped = sum(entry["count"] for entry in self.manifest.skipped.values())
        kept, size = (sum(self.manifest.count(split, what) for split in SPLITS) for what in ("documents", "bytes"))
        fault = "the sources have {:,} {}, but the manifest records {:,} in the shards"
        if kept + skipped != rows:
            self.faults.append(f"{fault.format(rows, 'documents', kept)} and {skipped:,} skipped")
        # Duplicates are left out after reading; with them the sources have more text.
        if size > text_bytes or (kept == documents and size != text_bytes):
            self.faults.append(fault.format(text_bytes, "bytes of text", size))

    def verdict(self) -> str:
        """What was verified."""
        found = [f"every id is below {self.vocab_size:,}"]
        if not self.manifest.is_foreign:
            found += ["sizes, hashes and counts match the manifest", "every shard ends with end-of-text"]
        if self.compares and self.documents and self.keeps_text:
            found.append("no document is in both splits")
        tokens = sum(shard.tokens for shard in self.shards)
        return f"{tokens:,} tokens, {self.documents:,} documents in {len(self.shards)} shard(s); {', '.join(found)}"

    def _verify_folder(self) -> None:
        """The vocabulary, and files that are not in the manifest."""
        if self.manifest.is_foreign:
            missed = "damage is found only if it gives ids outside the vocabulary"
            self.remarks.append(f"{self.manifest.program} records no hashes: {missed}")
            return
        try:
            self.token_bytes = from_spec(self.manifest.tokenizer, self.folder).token_bytes()
            self.keeps_text = self.token_bytes is not None
        except UserError as error:
            self.faults.append(str(error))
        vocabulary = vocabulary_file(self.manifest.tokenizer["name"])
        known = {MANIFEST_NAME, LISTING_NAME, vocabulary, *(shard.file for shard in self.shards)}
        strays = sorted(path.name for path in self.folder.iterdir() if path.name not in known and path.name[0] != ".")
        if strays and set(SPLITS) <= self.manifest.splits.keys():
            self.remarks.append(f"not in the manifest: {format_list(strays)}")

    def _tally(self, split: str, shard: Shard, advance: Advance) -> Tally:
        path = self.folder / shard.file
        try:
            if fault := size_fault(self.folder, self.manifest, shard):
                return Tally(unreadable=f"{path} {fault}", hash=hash_file(path) if path.is_file() else "")
            return self._scan(split, shard, advance)
        except OSError as error:
            return Tally(unreadable=f"{path} cannot be read: {error.strerror}")

    def _scan(self, split: str, shard: Shard, advance: Advance) -> Tally:
        # Hash, counts and comparison share one pass, as reading takes the longest.
        tally, hash_, finder = Tally(), xxhash.xxh3_128(), DocumentFinder(self.manifest)
        for block in blocks(self.folder / shard.file, self.manifest.header_bytes):
            hash_.update(block)
            part: TokenIds = np.frombuffer(block, self.manifest.dtype)
            if part.max() >= self.vocab_size:
                outside = np.flatnonzero(part >= self.vocab_size)
                if not tally.outside:
                    tally.first_outside = f"{part[outside[0]]} at position {finder.position + outside[0]}"
                tally.outside += len(outside)
            # Clipped: ids outside the vocabulary are counted above, and have no bytes.
            if self.token_bytes is not None:
                tally.text_bytes += int(self.token_bytes.take(part, mode="clip").sum())
            self._find_twins(split, shard, finder.feed(part), tally)
            tally.last_id = int(part[-1])
            advance(len(block))
        tally.hash, tally.documents = hash_.hexdigest(), finder.count
        return tally

    def _find_twins(self, split: str, shard: Shard, documents: tuple[Positions, Positions], tally: Tally) -> None:
        """Collect val's documents or look train's up, except those two shards share."""
        if not self.compares:
            return
        # Mapped anew for each block: one mapping of a large shard would keep all pages in memory.
        ids: TokenIds = np.asarray(map_shard(self.folder, self.manifest, shard))
        for start, length in zip(*(positions.tolist() for positions in documents), strict=True):
            # 0.4 us a document. Of 128 bits, so that equal ones are not compared again.
            key = xxhash.xxh3_128_digest(ids[start : start + length].data) if length else b""
            if key and split == "val":
                tally.seen.setdefault(key, Document(shard.file, start, length))
            elif twin := self.val_documents.get(key):
                if not tally.twins:
                    tally.first_twin = f"of {twin.length} tokens at position {start}, in {twin.file} at {twin.start}"
                tally.twins += 1

    def _report(self, shard: Shard, tally: Tally) -> None:
        path, ours = self.folder / shard.file, not self.manifest.is_foreign
        # Every other fault of a renamed shard would follow from this one.
        if ours and tally.hash != shard.hash and tally.hash in self.file_of_hash:
            self.faults.append(f"{path} has the content of {self.file_of_hash[tally.hash]}: renamed")
            return
        if tally.unreadable:
            self.faults.append(tally.unreadable)
            return
        if ours and tally.hash != shard.hash:
            self.faults.append(f"{path} has the hash {tally.hash}, but the manifest records {shard.hash}")
        if tally.outside:
            self.faults.append(
                f"{path} has {tally.outside:,} id(s) outside the vocabulary of {self.vocab_size:,}: "
                f"the first is {tally.first_outside}"
            )
        # What another program's manifest does not record is not compared.
        for what, found, wanted in (
            ("documents", tally.documents - shard.tails, shard.documents),
            ("bytes of text", tally.text_bytes, shard.bytes if self.token_bytes is not None else None),
        ):
            if wanted is not None and found != wanted:
                self.faults.append(f"{path} has {found} {what}, but the manifest records {wanted}")
        if tally.last_id != self.end_of_text and self.manifest.end_of_text == "after each document":
            (self.faults if ours else self.remarks).append(
                f"{path} does not end with end-of-text: its last id is {tally.last_id} at position {shard.tokens - 1}"
            )
        if tally.twins:
            more = f", and {tally.twins - 1:,} more of this shard" if tally.twins > 1 else ""
            shared = f"{path} has documents that are in both splits: one {tally.first_twin}{more}"
            if self.keeps_text:
                self.faults.append(shared)
            else:  # the splits go by the texts, which may differ where these ids do not
                name = self.manifest.tokenizer["name"]
                self.remarks.append(f"{shared}; the vocabulary {name} may give different texts the same ids")
