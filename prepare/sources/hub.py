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
from contextlib import contextmanager, suppress
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
from prepare.sources.hub_parquet import HubName, HubParquet, cause_of, record_files
from prepare.sources.items import Source
from prepare.sources.listing import Listing
from prepare.storage.files import StoredFile, assets, local_file
from prepare.units import SMALLEST_UNIT_BYTES, Document, Item, Reading, Texts, grouped

FILES_A_REQUEST = 500


@dataclass(frozen=True)
class HubStream(Source):
    """A dataset that is not Parquet: the parent reads it through `datasets` and packs the texts
    into units.

    `paths`: its files by their paths in the repository, if they are in the cache.
    """

    dataset: HubName
    builder: Any = field(repr=False)
    paths: dict[str, Path]
    has_splits: bool = field(default=True, kw_only=True, repr=False)

    is_stream = True
    size = 0

    def stored(self) -> list[StoredFile]:
        stamps = "".join(map(repr, super().stored()))
        etag = f"{self.dataset.revision} {hash_bytes(stamps.encode(errors='surrogateescape'))}"
        return [StoredFile(self.dataset.repository, 0, etag)]

    def split(self, file: StoredFile, unit_bytes: int) -> Iterator[Item]:
        yield self

    def files(self) -> list[Path]:
        return list(self.paths.values())

    def units(self) -> Iterator[Texts]:
        first = 0
        for texts, size in grouped(self._texts(), _text_bytes, SMALLEST_UNIT_BYTES, most=MOST_ROWS):
            yield Texts(texts, size, source=self.dataset.repository, first=first)
            first += len(texts)

    def locate(self, position: int) -> str:
        return f"{self.dataset.repository} row {position}"

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        sizes = {name: local_file(path).size for name, path in self.paths.items()}
        return record_files(self.dataset, sizes, lambda name: hash_of(self.paths[name])) or [asdict(self.dataset)]

    def _texts(self) -> Iterator[Document]:
        with _hub_faults(self.dataset.repository):
            for row in self.builder.as_streaming_dataset(split=self.reading.split):
                yield text_of(row, self.reading.text_field)


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


def open_hub(source: str, reading: Reading, seen: set[str]) -> HubParquet | HubStream:
    """Parquet repositories become local files in Hugging Face's cache; any other kind is streamed
    through `datasets`. Nothing that was `seen` before is read again.
    """
    found, listing = _open(parse_name(source), reading), Listing(seen)
    name = found.dataset
    commit = f"{name.repository}@{name.revision}"
    if isinstance(found, HubStream):
        if listing.is_new(f"{commit}:{name.config}:{reading.split}", name.repository):
            return found
        return HubParquet(reading, name, {}, passed_over=listing.passed_over)
    new = {path: size for path, size in found.sizes.items() if listing.is_new(f"{commit}/{path}", f"{commit}/{path}")}
    return replace(found, sizes=new, passed_over=listing.passed_over)


def _open(typed: HubName, reading: Reading) -> HubParquet | HubStream:
    from huggingface_hub import constants

    known = _load_listing(typed, reading.split)

    def cached(*, complete: bool) -> HubParquet | HubStream:
        if known is None:
            return _open_snapshot(typed, reading)
        found = HubParquet(reading, *known)
        if complete:  # no file can be downloaded later
            found.files()
        return found

    # A commit never changes, so the Hub need not be asked for the files of one that is known.
    if constants.HF_HUB_OFFLINE or (known and typed.revision == known[0].revision):
        return cached(complete=constants.HF_HUB_OFFLINE)
    try:
        return _open_online(typed, reading)
    except Unreachable as fault:
        logger.info("%s; looking in the cache", fault)
        try:
            return cached(complete=True)
        except Unreachable:
            raise fault from None


def _load_listing(typed: HubName, split: str) -> tuple[HubName, dict[str, int]] | None:
    """What a name was resolved to, and the Parquet files of a split with their sizes: all that must
    be known of a dataset to find it in the cache.
    """
    try:
        listing = json.loads(_listing_path(typed, split).read_bytes())
        return HubName(listing["repository"], listing["config"], listing["revision"]), listing["sizes"]
    except (OSError, ValueError, TypeError, KeyError):  # absent or damaged: the Hub knows it
        return None


def _save_listing(typed: HubName, found: HubParquet) -> None:
    # By what the user typed; and, as a branch moves, by the commit; the same for a config that was
    # not named.
    name = found.dataset
    content = json.dumps({**asdict(name), "sizes": found.sizes}).encode()
    for config, revision in product({typed.config, name.config}, {typed.revision, name.revision}):
        path = _listing_path(HubName(name.repository, config, revision), found.reading.split)
        with suppress(OSError):  # a cache that is shared may be read-only; what lies there is read all the same
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)


def _listing_path(name: HubName, split: str) -> Path:
    file = f"{name.repository}:{name.config or ''}@{name.revision or ''}#{split}.json"
    return assets() / "datasets" / quote(file, safe="")


def _open_online(typed: HubName, reading: Reading) -> HubParquet | HubStream:
    builder, urls = _load_builder(typed, typed.repository, reading.split)
    # `datasets` resolves a branch to its commit: hf://datasets/ORG/NAME@COMMIT/data/train-0.parquet
    parts = [re.fullmatch("hf://datasets/[^@]+@([0-9a-f]{40})/(.+)", url) for url in urls]
    name = HubName(typed.repository, builder.config.name, parts[0][1] if parts[0] else typed.revision)
    if not name.revision or not all(parts) or not all(url.endswith(".parquet") for url in urls):
        return HubStream(reading, name, builder, {})
    found = HubParquet(reading, name, _sizes(name, [each[2] for each in parts if each]))
    # Before the download: if that is interrupted, the list says what is missing, and the files that
    # are there are not taken for the complete split.
    _save_listing(typed, found)
    if missing := [size for file, size in found.sizes.items() if not found.path(file).exists()]:
        logger.info(
            "%s: downloading %s MB in %d files while they are read",
            name.repository,
            f"{sum(missing) / 1e6:,.0f}",
            len(missing),
        )
    return found


def _sizes(name: HubName, files: list[str]) -> dict[str, int]:
    """The files with their sizes, as the Hub lists them."""
    from huggingface_hub import RepoFile, get_paths_info

    sizes: dict[str, int] = {}
    with _hub_faults(name.repository):
        for begin in range(0, len(files), FILES_A_REQUEST):
            some = files[begin : begin + FILES_A_REQUEST]
            found = get_paths_info(name.repository, some, revision=name.revision, repo_type="dataset")
            sizes |= {info.path: info.size for info in found if isinstance(info, RepoFile)}
        return {file: sizes[file] for file in files}


def _open_snapshot(typed: HubName, reading: Reading) -> HubParquet | HubStream:
    """What another program, such as `hf download`, brought into the cache.

    Raises Unreachable if it did not.
    """
    from huggingface_hub import snapshot_download

    _quiet()
    try:
        found = snapshot_download(typed.repository, repo_type="dataset", revision=typed.revision, local_files_only=True)
    except Exception as error:  # as in HubParquet
        raise Unreachable(
            f"dataset {typed.repository} is not complete in Hugging Face's cache ({cause_of(error)}): "
            f"run pipeline fetch hf:{typed.repository} on a machine with a network"
        ) from None
    root = Path(found).resolve()
    logger.info("%s: using the copy in the cache, %s", typed.repository, root)
    builder, urls = _load_builder(HubName(typed.repository, typed.config, None), str(root), reading.split)
    name = HubName(typed.repository, builder.config.name, root.name)
    # A data file may lie elsewhere, such as behind a URL that the repository names.
    paths = {Path(url).relative_to(root).as_posix(): Path(url) for url in urls if Path(url).is_relative_to(root)}
    if len(paths) < len(urls) or not all(url.endswith(".parquet") for url in urls):
        return HubStream(reading, name, builder, paths)
    return HubParquet(reading, name, {file: local_file(path).size for file, path in paths.items()})


def fetch_hub(source: str, split: str) -> None:
    """Bring a dataset into Hugging Face's cache: the Parquet files of a split, or the complete
    repository.
    """
    from huggingface_hub import snapshot_download

    found = open_hub(source, Reading(split=split), set())
    name = found.dataset
    if isinstance(found, HubParquet):
        with ProgressReport(f"download {name.repository}", total=len(found.sizes), unit="files") as report:
            for _ in found.downloaded():
                report.advance(1)
        return
    with _hub_faults(name.repository):
        snapshot_download(name.repository, repo_type="dataset", revision=name.revision)


def _load_builder(name: HubName, path: str, split: str) -> tuple[Any, list[str]]:
    """The reader that `datasets` chooses for a repository, or for its local copy at `path`, and the
    files of a split.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("reading the Hub needs a package that is not installed: pip install 'datasets>=4.0'") from None
    # A progress bar in a log file is a page of control characters.
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    _quiet()
    with _hub_faults(name.repository):
        builder = datasets.load_dataset_builder(path, name=name.config, revision=name.revision)
    files = {str(each): list(found) for each, found in (builder.config.data_files or {}).items()}
    if not files.get(split):
        splits = ", ".join(files)
        raise UserError(
            f"dataset {name.repository} has no split {split!r}, its splits are: {splits}; choose with --split"
        )
    return builder, files[split]


def _quiet() -> None:
    """Their warnings repeat at every retry; the final failure is in the error."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        disable_progress_bars()


@contextmanager
def _hub_faults(repository: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets lets through what the Hub, the network and its parsers raise
        cause = one_line(error)
        if "scripts are no longer supported" in cause:
            raise UserError(
                f"dataset {repository} comes as a script, and scripts from the Hub are never run: "
                "choose a repository with data files (Parquet, JSONL), or a revision that has them"
            ) from None
        if names := re.search(r"(?:available configs|Available): \[(.*?)\]", cause):
            configs = names[1].replace("'", "")
            raise UserError(
                f"dataset {repository} has several configs: {configs}; write hf:{repository}:CONFIG"
            ) from None
        raise Unreachable(
            f"dataset {repository} could not be opened ({cause_of(error)}): check its name and the network, "
            f"or run pipeline fetch hf:{repository} on a machine with one and share its HF_HOME"
        ) from None
