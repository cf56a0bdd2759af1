"""Datasets of the Hugging Face Hub: Parquet repositories become local files, any other kind is
streamed.

Downloads, their resumption and their cache are huggingface_hub's (HF_HOME, HF_HUB_OFFLINE). Only
names and data cross from the Hub: a repository's own program is never run.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import UserError, one_line
from pipeline.files import hash_bytes, write_atomic
from pipeline.log import ProgressReport, logger
from prepare.documents.fields import text_of
from prepare.documents.parquet import MOST_ROWS
from prepare.sources.items import Source
from prepare.storage.files import StoredFile, assets, local_file
from prepare.units import SMALLEST_UNIT_BYTES, Document, Item, Reading, Texts, grouped


@dataclass(frozen=True)
class HubName:
    """A dataset of the Hub: as the user typed it, or with its config and commit."""

    repository: str
    config: str | None
    revision: str | None


@dataclass(frozen=True)
class HubParquet(Source):
    """Parquet files in the local cache, by their paths in the repository."""

    dataset: HubName
    paths: dict[str, Path]

    def files(self) -> list[Path]:
        return list(self.paths.values())

    def stored(self) -> list[StoredFile]:
        # By the commit and not by the time, which differs between the caches of two machines.
        return [replace(local_file(path), etag=self.dataset.revision) for path in self.files()]

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [
            {**asdict(self.dataset), "path": name, "bytes": path.stat().st_size, "hash": hash_of(path)}
            for name, path in self.paths.items()
        ]


@dataclass(frozen=True)
class HubStream(Source):
    """A dataset that is not Parquet: the parent reads it through `datasets` and packs the texts
    into units. `copies` are its files where they are on this machine.
    """

    dataset: HubName
    builder: Any = field(repr=False)
    copies: tuple[Path, ...] = ()

    is_stream = True
    size = 0

    def files(self) -> list[Path]:
        return list(self.copies)

    def stored(self) -> list[StoredFile]:
        stamps = "".join(map(repr, super().stored()))
        etag = f"{self.dataset.revision} {hash_bytes(stamps.encode(errors='surrogateescape'))}"
        return [StoredFile(self.dataset.repository, 0, etag)]

    def split(self, file: StoredFile, unit_bytes: int) -> Iterator[Item]:
        yield self

    def units(self) -> Iterator[Texts]:
        first = 0
        for texts, size in grouped(self._texts(), _text_bytes, SMALLEST_UNIT_BYTES, most=MOST_ROWS):
            yield Texts(texts, size, source=self.dataset.repository, first=first)
            first += len(texts)

    def locate(self, position: int) -> str:
        return f"{self.dataset.repository} row {position}"

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        known = asdict(self.dataset)
        copies = [
            {**known, "path": path.name, "bytes": path.stat().st_size, "hash": hash_of(path)} for path in self.copies
        ]
        return copies or [known]

    def _texts(self) -> Iterator[Document]:
        repository = self.dataset.repository
        try:
            for row in self.builder.as_streaming_dataset(split="train"):
                yield text_of(row, self.reading.text_field)
        except UserError:
            raise
        except Exception as error:  # as in _load_builder
            raise _hub_fault(repository, error) from None


def _text_bytes(text: Document) -> int:
    return len(text) if isinstance(text, bytes) else 0


def parse_name(source: str) -> HubName:
    parts = re.fullmatch(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<revision>\S+))?", source)
    if parts is None:
        raise UserError(f"{source!r} does not name a dataset of the Hub: expected hf:ORG/NAME[:CONFIG][@REVISION]")
    revision = parts["revision"]
    return HubName(parts["repository"], parts["config"], revision if revision != "main" else None)


class Unreachable(UserError):
    """The Hub could not be asked, or does not know the dataset; the cache may have it all the same."""


def open_hub(source: str, reading: Reading) -> HubParquet | HubStream:
    """Parquet repositories become local files in Hugging Face's cache; any other kind is streamed
    through `datasets`.
    """
    from huggingface_hub import constants

    name = parse_name(source)
    known = _load_listing(name)

    def cached() -> HubParquet | HubStream:
        return _open_parquet(*known, reading) if known else _open_snapshot(name, reading)

    # A commit never changes, so the Hub need not be asked for the files of one that is known.
    if constants.HF_HUB_OFFLINE or (known and name.revision == known[0].revision):
        return cached()
    try:
        return _open_online(name, reading)
    except Unreachable as fault:
        logger.info("%s; looking in the cache", fault)
        try:
            return cached()
        except Unreachable:
            raise fault from None


def _load_listing(typed: HubName) -> tuple[HubName, list[str]] | None:
    """What a name was resolved to, and the Parquet files of its train split: all that must be known
    of a dataset to find it in the cache.
    """
    try:
        listing = json.loads(_listing_path(typed).read_bytes())
        return HubName(listing["repository"], listing["config"], listing["revision"]), listing["files"]
    except (OSError, ValueError, TypeError, KeyError):  # absent or damaged: the Hub knows it
        return None


def _save_listing(typed: HubName, found: HubName, files: list[str]) -> None:
    # By what the user typed; and, as a branch moves, by the commit; the same for a config that was
    # not named.
    content = json.dumps({**asdict(found), "files": files}).encode()
    for config, revision in product({typed.config, found.config}, {typed.revision, found.revision}):
        path = _listing_path(HubName(found.repository, config, revision))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def _listing_path(name: HubName) -> Path:
    file = f"{name.repository}:{name.config or ''}@{name.revision or ''}.json"
    return assets() / "datasets" / quote(file, safe="")


def _open_parquet(name: HubName, files: list[str], reading: Reading) -> HubParquet:
    """Downloads what the cache lacks. Raises UserError."""
    from huggingface_hub import hf_hub_download

    _quiet()
    paths = {}
    with ProgressReport(f"download {name.repository}", total=len(files), unit="files") as report:
        for file in files:
            try:
                path = hf_hub_download(name.repository, file, repo_type="dataset", revision=name.revision)
            except Exception as error:  # what the Hub, the network and the cache raise has no common kind
                raise UserError(
                    f"{file} of dataset {name.repository} is not in the cache and could not be downloaded "
                    f"({_cause(error)}): run pipeline fetch hf:{name.repository}:{name.config}@{name.revision} "
                    "on a machine with a network"
                ) from None
            paths[file] = Path(path)
            report.advance(1)
    return HubParquet(reading, name, paths)


def _open_online(typed: HubName, reading: Reading) -> HubParquet | HubStream:
    builder, urls = _load_builder(typed, typed.repository)
    # `datasets` resolves a branch to its commit: hf://datasets/ORG/NAME@COMMIT/data/train-0.parquet
    parts = [re.fullmatch("hf://datasets/[^@]+@([0-9a-f]{40})/(.+)", url) for url in urls]
    name = HubName(typed.repository, builder.config.name, parts[0][1] if parts[0] else typed.revision)
    if not name.revision or not all(parts) or not all(url.endswith(".parquet") for url in urls):
        return HubStream(reading, name, builder)
    files = [each[2] for each in parts if each]
    # Before the download: if that is interrupted, the list says what is missing, and the files that
    # are there are not taken for the complete split.
    _save_listing(typed, name, files)
    return _open_parquet(name, files, reading)


def _open_snapshot(typed: HubName, reading: Reading) -> HubParquet | HubStream:
    """What another program, such as `hf download`, brought into the cache.

    Raises Unreachable if it did not.
    """
    from huggingface_hub import snapshot_download

    _quiet()
    try:
        found = snapshot_download(typed.repository, repo_type="dataset", revision=typed.revision, local_files_only=True)
    except Exception as error:  # as in _open_parquet
        raise Unreachable(
            f"dataset {typed.repository} is not complete in Hugging Face's cache ({_cause(error)}): "
            f"run pipeline fetch hf:{typed.repository} on a machine with a network"
        ) from None
    root = Path(found).resolve()
    logger.info("%s: using the copy in the cache, %s", typed.repository, root)
    builder, urls = _load_builder(HubName(typed.repository, typed.config, None), str(root))
    name = HubName(typed.repository, builder.config.name, root.name)
    if not all(url.endswith(".parquet") for url in urls):
        return HubStream(reading, name, builder, copies=tuple(map(Path, urls)))
    return HubParquet(reading, name, {Path(url).relative_to(root).as_posix(): Path(url) for url in urls})


def fetch_hub(source: str) -> None:
    """Bring a dataset into Hugging Face's cache: the Parquet files of its train split, or the
    complete repository.
    """
    from huggingface_hub import snapshot_download

    found = open_hub(source, Reading())
    if isinstance(found, HubStream):
        name = found.dataset
        try:
            snapshot_download(name.repository, repo_type="dataset", revision=name.revision)
        except Exception as error:  # as in _open_parquet
            raise _hub_fault(name.repository, error) from None


def _load_builder(name: HubName, path: str) -> tuple[Any, list[str]]:
    """The reader that `datasets` chooses for a repository, or for its local copy at `path`, and the
    files of its train split.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("reading the Hub needs a package that is not installed: pip install 'datasets>=4.0'") from None
    # A progress bar in a log file is a page of control characters.
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    _quiet()
    try:
        builder = datasets.load_dataset_builder(path, name=name.config, revision=name.revision)
    except Exception as error:  # datasets lets through what the Hub, the network and its parsers raise
        raise _hub_fault(name.repository, error) from None
    files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if not files.get("train"):
        raise UserError(f"dataset {name.repository} has no split 'train', its splits are: {', '.join(files)}")
    return builder, files["train"]


def _quiet() -> None:
    """Their warnings repeat at every retry; the final failure is in the error."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        disable_progress_bars()


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _hub_fault(repository: str, error: Exception) -> UserError:
    cause = one_line(error)
    if "scripts are no longer supported" in cause:
        return UserError(
            f"dataset {repository} comes as a script, and scripts from the Hub are never run: "
            "choose a repository with data files (Parquet, JSONL), or a revision that has them"
        )
    if names := re.search(r"(?:available configs|Available): \[(.*?)\]", cause):
        configs = names[1].replace("'", "")
        return UserError(f"dataset {repository} has several configs: {configs}; write hf:{repository}:CONFIG")
    return Unreachable(
        f"dataset {repository} could not be opened ({_cause(error)}): check its name and the network, "
        f"or run pipeline fetch hf:{repository} on a machine with one and share its HF_HOME"
    )
