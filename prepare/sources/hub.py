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
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import UserError, one_line
from pipeline.files import write_atomic
from pipeline.log import ProgressReport, logger
from prepare.documents.parquet import MOST_ROWS
from prepare.sources.items import Source, SourceFile, items_of
from prepare.storage.assets import assets
from prepare.units import NULL, SMALLEST_UNIT_BYTES, Item, Refused, Texts, encoded, grouped, no_field, no_text


@dataclass(frozen=True)
class HubParquet(Source):
    """Parquet files of a Hub repository in the local cache; `names` are their paths in the
    repository.
    """

    paths: list[Path]
    names: list[str]
    text_field: str
    about: dict[str, Any]

    def items(self, unit_bytes: int) -> list[Item]:
        files = (SourceFile(str(path), path.stat().st_size) for path in self.paths)
        return items_of(files, self.text_field, unit_bytes)

    def files(self) -> list[Path]:
        return self.paths

    def stamps(self) -> dict[str, Any]:
        return {
            f"{self.about['repository']}/{name}": [self.about["revision"], path.stat().st_size]
            for name, path in zip(self.names, self.paths, strict=True)
        }

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [
            {**self.about, "path": name, "bytes": path.stat().st_size, "hash": hash_of(path)}
            for name, path in zip(self.names, self.paths, strict=True)
        ]


@dataclass(frozen=True)
class HubStream(Source):
    """A dataset that is not Parquet: the parent reads it through `datasets` and packs the texts
    into units.
    """

    builder: Any
    text_field: str
    about: dict[str, Any]

    size = 0

    def items(self, unit_bytes: int) -> list[Item]:
        return [self]

    def units(self) -> Iterator[Texts]:
        def size_of(text: bytes | Refused) -> int:
            return len(text) if isinstance(text, bytes) else 0

        first = 0
        for texts, size in grouped(self._texts(), size_of, SMALLEST_UNIT_BYTES, most=MOST_ROWS):
            yield Texts(texts, size, source=self.about["repository"], first=first)
            first += len(texts)

    def locate(self, position: int) -> str:
        return f"{self.about['repository']} row {position}"

    def file_bytes(self) -> int | None:
        return None

    def stamps(self) -> dict[str, Any]:
        return {self.about["repository"]: self.about["revision"]}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [self.about]

    def _texts(self) -> Iterator[bytes | Refused]:
        repository = self.about["repository"]
        try:
            for number, row in enumerate(self.builder.as_streaming_dataset(split="train"), start=1):
                where = f"dataset {repository} row {number}"
                if self.text_field not in row:
                    raise UserError(no_field(where, self.text_field, row))
                text = row[self.text_field]
                if text is not None and not isinstance(text, str):
                    raise UserError(no_text(where, self.text_field, text))
                yield Refused(NULL) if text is None else encoded(text)
        except UserError:
            raise
        except Exception as error:  # as in _load_builder
            raise _hub_fault(repository, error) from None


@dataclass(frozen=True)
class HubName:
    repository: str
    config: str | None
    revision: str | None


def parse_name(source: str) -> HubName:
    parts = re.fullmatch(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<revision>\S+))?", source)
    if parts is None:
        raise UserError(f"{source!r} does not name a dataset of the Hub: expected hf:ORG/NAME[:CONFIG][@REVISION]")
    revision = parts["revision"]
    return HubName(parts["repository"], parts["config"], revision if revision != "main" else None)


class Unreachable(UserError):
    """The Hub could not be asked, or does not know the dataset; the cache may have it all the same."""


@dataclass(frozen=True)
class Listing:
    """The Parquet files of a train split at one commit: all that must be known of a dataset to find
    it in the cache.

    Kept there by what the user typed, so that an interrupted download is not taken for the complete
    split.
    """

    repository: str
    config: str
    revision: str
    files: list[str]

    @staticmethod
    def load(name: HubName) -> "Listing | None":
        path = _listing_path(name.repository, name.config, name.revision)
        try:
            return Listing(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):  # absent or damaged: the Hub knows it
            return None

    def save(self, name: HubName) -> None:
        # A branch moves, so the commit is found by its hash as well; the same for a config that was
        # not named.
        content = json.dumps(asdict(self)).encode()
        for config, revision in product({name.config, self.config}, {name.revision, self.revision}):
            path = _listing_path(self.repository, config, revision)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)

    def open(self, text_field: str) -> HubParquet:
        """Downloads what the cache lacks. Raises UserError."""
        from huggingface_hub import hf_hub_download

        _quiet()
        paths = []
        with ProgressReport(f"download {self.repository}", total=len(self.files), unit="files") as report:
            for file in self.files:
                try:
                    path = hf_hub_download(self.repository, file, repo_type="dataset", revision=self.revision)
                except Exception as error:  # what the Hub, the network and the cache raise has no common kind
                    raise UserError(
                        f"{file} of dataset {self.repository} is not in the cache and could not be downloaded "
                        f"({_cause(error)}): run pipeline fetch hf:{self.repository}:{self.config}@{self.revision} "
                        "on a machine with a network"
                    ) from None
                paths.append(Path(path))
                report.advance(1)
        about = {"repository": self.repository, "config": self.config, "revision": self.revision}
        return HubParquet(paths, self.files, text_field, about)


def _listing_path(repository: str, config: str | None, revision: str | None) -> Path:
    return assets() / "datasets" / quote(f"{repository}:{config or ''}@{revision or ''}.json", safe="")


def open_hub(source: str, text_field: str) -> HubParquet | HubStream:
    """Parquet repositories become local files in Hugging Face's cache; any other kind is streamed
    through `datasets`.
    """
    from huggingface_hub import constants

    name = parse_name(source)
    known = Listing.load(name)
    if known and name.revision == known.revision:  # a commit never changes, so the Hub need not be asked
        return known.open(text_field)
    if constants.HF_HUB_OFFLINE:
        return known.open(text_field) if known else _open_snapshot(name, text_field)
    try:
        return _open_online(name, text_field)
    except Unreachable as fault:
        logger.info("%s; looking in the cache", fault)
        try:
            return known.open(text_field) if known else _open_snapshot(name, text_field)
        except Unreachable:
            raise fault from None


def _open_online(name: HubName, text_field: str) -> HubParquet | HubStream:
    builder = _load_builder(name, name.repository)
    urls = _train_files(builder, name.repository)
    # `datasets` resolves a branch to its commit: hf://datasets/ORG/NAME@COMMIT/data/train-0.parquet
    found = [re.fullmatch("hf://datasets/[^@]+@([0-9a-f]{40})/(.+)", url) for url in urls]
    commit = found[0][1] if found[0] else name.revision
    if commit and all(found) and all(url.endswith(".parquet") for url in urls):
        listing = Listing(name.repository, builder.config.name, commit, files=[each[2] for each in found if each])
        listing.save(name)  # before the download: if that is interrupted, the list says what is missing
        return listing.open(text_field)
    about = {"repository": name.repository, "config": builder.config.name, "revision": commit}
    return HubStream(builder, text_field, about)


def _open_snapshot(name: HubName, text_field: str) -> HubParquet | HubStream:
    """What another program, such as `hf download`, brought into the cache.

    Raises Unreachable if it did not.
    """
    from huggingface_hub import snapshot_download

    _quiet()
    try:
        found = snapshot_download(name.repository, repo_type="dataset", revision=name.revision, local_files_only=True)
    except Exception as error:  # as in Listing.open
        raise Unreachable(
            f"dataset {name.repository} is not complete in Hugging Face's cache ({_cause(error)}): "
            f"run pipeline fetch hf:{name.repository} on a machine with a network"
        ) from None
    root = Path(found).resolve()
    logger.info("%s: using the copy in the cache, %s", name.repository, root)
    builder = _load_builder(HubName(name.repository, name.config, None), str(root))
    urls = _train_files(builder, name.repository)
    about = {"repository": name.repository, "config": builder.config.name, "revision": root.name}
    if not all(url.endswith(".parquet") for url in urls):
        return HubStream(builder, text_field, about)
    names = [Path(url).relative_to(root).as_posix() for url in urls]
    return HubParquet([Path(url) for url in urls], names, text_field, about)


def fetch_hub(source: str) -> None:
    """Bring a dataset into Hugging Face's cache: the Parquet files of its train split, or the
    complete repository.
    """
    from huggingface_hub import snapshot_download

    found = open_hub(source, text_field="")
    if isinstance(found, HubStream):
        repository, revision = found.about["repository"], found.about["revision"]
        try:
            snapshot_download(repository, repo_type="dataset", revision=revision)
        except Exception as error:  # as in Listing.open
            raise _hub_fault(repository, error) from None


def _train_files(builder: Any, repository: str) -> list[str]:
    data_files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if not data_files.get("train"):
        raise UserError(f"dataset {repository} has no split 'train', its splits are: {', '.join(data_files)}")
    return data_files["train"]


def _load_builder(name: HubName, path: str) -> Any:
    """What `datasets` knows of the data files in a repository, which `path` names, or in its local
    copy there.
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
        return datasets.load_dataset_builder(path, name=name.config, revision=name.revision)
    except Exception as error:  # datasets lets through what the Hub, the network and its parsers raise
        raise _hub_fault(name.repository, error) from None


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
