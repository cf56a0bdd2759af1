"""A dataset on disk: shards of bare token ids, and the manifest that says what they are.

    data/<name>/train_00000.bin ...   little-endian ids, no header: np.memmap(file, dtype=np.uint16) reads one
    data/<name>/val_00000.bin ...
    data/<name>/manifest.json         written last; a folder without it is not a dataset

Documents follow each other, each ended by the end-of-text token. A document is never split: a shard
is closed by the document that fills it, so every shard ends with an end-of-text token.

Shards of nanoGPT and llm.c are read too: they have no manifest, so one is derived from their files.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from pipeline.config.keys import Config
from pipeline.dataset import foreign
from pipeline.errors import UserError
from pipeline.files import check_types, dump_json, hash_bytes, is_plain_name, parse_json, write_atomic
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.specs import check_spec
from pipeline.vocabulary.tokenizer import token_dtype

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
READ_AROUND_BYTES = 1 << 17  # Linux's own for memory maps
LISTING_NAME = "decontaminated.jsonl"  # the documents that --decontaminate left out
SPLITS = foreign.SPLITS
AFTER_EACH_DOCUMENT = foreign.END_OF_TEXT_STANDS[foreign.NANOGPT]


@dataclass(frozen=True)
class Shard:
    """One file of token ids. `bytes` is the size of the UTF-8 text it was made from; `hash` is
    XXH3-128 of the file. `tails` of documents follow beginnings in train, where they are counted.

    In another program's shard only `tokens` is known, and `hash` covers samples of it
    (`foreign.sample_hash`).
    """

    file: str
    tokens: int
    documents: int | None
    bytes: int | None
    hash: str
    tails: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything a reader of the shards has to know, and where they came from.

    `skipped` holds for each reason how many documents were left out (`count`) and the location of
    one (`example`), `passed_over` the same of files; `read` what was counted while each source was
    read; `statistics` is what `prepare` measured about the tokens.
    """

    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[str, list[Shard]]
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    val_rule: dict[str, Any]
    skipped: dict[str, dict[str, Any]]
    program: str
    unusual: dict[str, dict[str, Any]] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    passed_over: dict[str, dict[str, Any]] = field(default_factory=dict)
    read: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT_VERSION
    end_of_text: str = AFTER_EACH_DOCUMENT

    @property
    def fingerprint(self) -> str:
        """Names the content: equal fingerprints mean the same tokens in the same order under the
        same vocabulary.
        """
        # Neither sources nor options: they may differ where the tokens do not.
        shards = {split: [shard.hash for shard in shards] for split, shards in self.splits.items()}
        content = {"tokenizer": self.tokenizer, "dtype": self.dtype, "shards": shards}
        return hash_bytes(dump_json(content, sort_keys=True))

    @property
    def shards(self) -> list[Shard]:
        """Those of all splits."""
        return [shard for shards in self.splits.values() for shard in shards]

    @property
    def is_foreign(self) -> bool:
        """Whether another program wrote the shards: no manifest is on disk, and GPT-2's vocabulary
        is assumed.
        """
        return self.program in foreign.HEADER_BYTES

    @property
    def end_of_text_follows(self) -> bool:
        """Whether the end-of-text token stands after each document, and not before it."""
        return self.end_of_text == AFTER_EACH_DOCUMENT

    @property
    def header_bytes(self) -> int:
        """Bytes before the first id of each shard."""
        return foreign.HEADER_BYTES.get(self.program, 0)

    @property
    def remedy(self) -> str:
        """How to fix a damaged shard."""
        return "fetch or write it again" if self.is_foreign else "restore it, or prepare again with --force"

    def count(self, split: str, what: str) -> int:
        """The sum over a split's shards of `what`: tokens, or, if prepared here, documents or
        bytes.
        """
        return sum(getattr(shard, what) for shard in self.splits[split])

    def save(self, folder: Path) -> None:
        write_atomic(folder / MANIFEST_NAME, dump_json(asdict(self), indent=2))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a dataset whose shards have the right size. Raises UserError where it is
    missing, incomplete or in another format.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """A dataset's manifest, or one from the headers of another program's shards; files are not
    checked against it.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"no dataset at {folder}: prepare one with `pipeline prepare SOURCE --name {folder.name}`")
    if not path.is_file():
        if found := foreign.find(folder):
            return _foreign_manifest(*found)
        raise UserError(
            f"{folder} is not a complete dataset: it has no {MANIFEST_NAME}, so its preparation did not finish; "
            "run the same `pipeline prepare` command again"
        )
    try:
        document = parse_json(path.read_bytes())
        # First: another format may have other keys.
        if document["format"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {document['format']!r}, this program reads {FORMAT_VERSION}: prepare it again"
            )
        shards = document.pop("splits")
        splits = {split: [Shard(**shard) for shard in shards[split]] for split in SPLITS}
        manifest = Manifest(splits=splits, **document)
        _check_form(folder, manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): prepare the dataset again with --force"
        ) from None
    return manifest


def path_or_name(path: Path) -> Path:
    """The folder of a dataset that is given by its name; a path that exists wins over a name."""
    named = Path(Config().data.data_dir) / path
    return named if not path.exists() and named.exists() else path


def read_path(path: Path) -> tuple[Path, Manifest]:
    """The folder of a dataset and its manifest; a single shard is a dataset of that shard alone."""
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a run: give one of the folders in {path / 'checkpoints'}")
    if not path.is_file():
        return path, read_manifest(path)
    folder = path.parent
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        named = {split: [shard for shard in manifest.splits[split] if shard.file == path.name] for split in SPLITS}
        alone = {split: shards for split, shards in named.items() if shards}
        if not alone:
            raise UserError(f"{path} is not listed in the {MANIFEST_NAME} next to it: give one of its shards")
        return folder, replace(manifest, splits=alone)
    program = foreign.sniff(path)  # first, as it has more to say about a file that is not a shard
    if path.suffix != ".bin":
        raise UserError(f"{path} is not a shard: expected a dataset folder or a .bin file of token ids")
    if program == foreign.NANOGPT:
        foreign.refuse_pickled_vocabulary(folder)
    return folder, _foreign_manifest(program, {"shard": [path]})


def _foreign_manifest(program: str, files: dict[str, list[Path]]) -> Manifest:
    tokenizer = BytePairTokenizer("gpt2")
    splits = {
        split: [
            Shard(path.name, foreign.token_count(path, program), None, bytes=None, hash=foreign.sample_hash(path))
            for path in paths
        ]
        for split, paths in files.items()
    }
    return Manifest(
        tokenizer=tokenizer.spec(), dtype=token_dtype(tokenizer.vocab_size).name, splits=splits, sources=[], options={},
        val_rule={}, skipped={}, program=program, end_of_text=foreign.END_OF_TEXT_STANDS[program],
    )  # fmt: skip


def _check_form(folder: Path, manifest: Manifest) -> None:
    """Raises KeyError, TypeError or UserError for what this program never writes."""
    # A manifest may come from anyone, and must not have other files read or removed.
    shard_types = get_type_hints(Shard)
    for shard in manifest.shards:
        check_types(vars(shard), shard_types)
        if not is_plain_name(shard.file):
            raise UserError(f"{folder / MANIFEST_NAME} lists a shard outside its folder: {shard.file!r}")
        if shard.tokens < 1:
            raise TypeError(f"{shard.file} has {shard.tokens} tokens")
    check_types(vars(manifest), get_type_hints(Manifest))
    check_spec(manifest.tokenizer)
    if manifest.end_of_text not in foreign.END_OF_TEXT_STANDS.values():
        raise TypeError(f"end_of_text is {manifest.end_of_text!r}")
    vocab_size = manifest.tokenizer["vocab_size"]
    wanted = token_dtype(vocab_size)
    if manifest.dtype != wanted.name:
        raise UserError(
            f"{folder} holds {manifest.dtype} ids, but a vocabulary of {vocab_size} needs {wanted.name}: prepare it again"
        )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises UserError for the first shard that is missing or does not have the size in the
    manifest.
    """
    for shard in manifest.shards:
        if fault := size_fault(folder, manifest, shard):
            raise UserError(f"{folder / shard.file} {fault}: {manifest.remedy}")


def size_fault(folder: Path, manifest: Manifest, shard: Shard) -> str | None:
    """What is wrong with a shard's size, None where it is as recorded in the manifest."""
    path = folder / shard.file
    wanted = manifest.header_bytes + shard.tokens * np.dtype(manifest.dtype).itemsize
    found = path.stat().st_size if path.is_file() else None
    if found == wanted:
        return None
    return f"{'is missing' if found is None else f'has {found} bytes'}, expected {wanted} bytes"


def map_shard(folder: Path, manifest: Manifest, shard: Shard) -> np.memmap[Any, np.dtype[Any]]:
    """A shard's ids, memory-mapped: nothing is read until it is accessed."""
    dtype = token_dtype(manifest.tokenizer["vocab_size"])
    return np.memmap(folder / shard.file, dtype=dtype, mode="r", offset=manifest.header_bytes)


class TokenReader:
    """A split's shards as one flat array of ids.

    Read from open files, not from memory maps: of those, a shard that is truncated, or a disk that
    fails, would end the process by SIGBUS.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        shards = manifest.splits[split]
        self._files = [(folder / shard.file).open("rb", buffering=0) for shard in shards]
        self._dtype, self._header_bytes = token_dtype(manifest.tokenizer["vocab_size"]), manifest.header_bytes
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._remedy = manifest.remedy
        self.folder, self.split = folder, split
        self.vocab_size: int = manifest.tokenizer["vocab_size"]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def name(self) -> str:
        return f"{self.folder}'s {self.split} split"

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids [start, stop) of the split, across shard borders. Raises UserError for an id outside
        the vocabulary.
        """
        # One piece mostly: a shard holds many windows, and only its last one crosses into the next.
        pieces, position = [], start
        while position < stop:
            shard = self._shard_of(position)
            end = min(stop, int(self._starts[shard + 1]))
            pieces.append(self._read_shard(shard, position - int(self._starts[shard]), end - position))
            position = end
        ids = np.concatenate(pieces).astype(np.int64)
        # Checked here, as an id past the embedding's rows would be a CUDA assertion without a name.
        if ids.size and ids.max() >= self.vocab_size:
            file = self._files[self._shard_of(start + int(ids.argmax()))].name
            raise UserError(
                f"{file} holds id {ids.max()}, but its vocabulary has {self.vocab_size}: "
                f"the file is damaged or was made with another vocabulary; {self._remedy}"
            )
        return ids

    def _read_shard(self, shard: int, start: int, count: int) -> npt.NDArray[Any]:
        """`count` ids of a shard from its id `start` on. Raises UserError if it has become shorter,
        OSError if it cannot be read.
        """
        file, size = self._files[shard], self._dtype.itemsize
        begin = self._header_bytes + start * size
        if hasattr(os, "posix_fadvise"):
            # The block around it, as a memory map would: windows come in random order, and a cold disk
            # would answer each with one page.
            os.posix_fadvise(
                file.fileno(), begin - begin % READ_AROUND_BYTES, READ_AROUND_BYTES, os.POSIX_FADV_WILLNEED
            )
        content = os.pread(file.fileno(), count * size, begin)
        if len(content) < count * size:
            length = os.fstat(file.fileno()).st_size
            raise UserError(f"{file.name} was truncated while it was in use, to {length:,} bytes: {self._remedy}")
        return np.frombuffer(content, self._dtype)

    def _shard_of(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1
