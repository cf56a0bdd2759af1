"""Datasets of the Hugging Face Hub: Parquet repositories become local files, every other kind is streamed.

Only names and data cross from the Hub: a repository's own program is never run.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line
from pipeline.log import ProgressReport, logger
from prepare.documents.lines import LineText
from prepare.documents.parquet import MOST_ROWS, plan_parquet
from prepare.sources.offline import hub_records, offline_folder
from prepare.units import (
    LONE_SURROGATE,
    LONG_BYTES,
    NULL,
    SMALLEST_UNIT_BYTES,
    Document,
    Item,
    OneUnit,
    Refused,
    Texts,
    no_field,
    no_text,
    spool_file,
)


@dataclass(frozen=True)
class HubParquet:
    """Parquet files of a Hub repository on the local disk. The cache names them anew, so `names` holds their places."""

    paths: list[Path]
    names: list[str]
    text_field: str
    about: dict[str, Any]

    def items(self, unit_bytes: int) -> list[Item]:
        return [
            unit
            for path in self.paths
            for unit in plan_parquet(str(path), path.stat().st_size, self.text_field, unit_bytes)
        ]

    def files(self) -> list[Path]:
        return self.paths

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

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
class SpooledText(OneUnit):
    """A long text of row `row`, kept in a file."""

    spooled: str
    size: int
    what: str
    row: int

    def documents(self) -> Iterator[tuple[int, Document]]:
        yield self.row, LineText(self.spooled, 0, self.size)

    def place(self, position: int) -> str:
        return f"{self.what} row {position}"


@dataclass(frozen=True)
class HubStream:
    """A Hub dataset that is not Parquet: the parent reads it through `datasets` and packs the texts into units."""

    builder: Any
    text_field: str
    about: dict[str, Any]
    spool: Path

    size = 0

    def items(self, unit_bytes: int) -> list[Item]:
        return [self]

    def units(self) -> Iterator[Texts | SpooledText]:
        batch: list[Document] = []
        size = first = 0
        for row, text in enumerate(self._texts()):
            long = isinstance(text, bytes) and len(text) > LONG_BYTES
            if batch and (long or size >= SMALLEST_UNIT_BYTES or len(batch) >= MOST_ROWS):
                yield Texts(tuple(batch), size, self.about["repository"], first)
                batch, size = [], 0
            if isinstance(text, bytes) and long:
                yield self._spooled(row, text)
                continue
            if not batch:
                first = row
            batch.append(text)
            size += len(text) if isinstance(text, bytes) else 0
        if batch:
            yield Texts(tuple(batch), size, self.about["repository"], first)

    def place(self, position: int) -> str:
        return f"{self.about['repository']} row {position}"

    def _spooled(self, row: int, text: bytes) -> SpooledText:
        with spool_file(self.spool) as file:
            file.write(text)
        return SpooledText(str(file.name), len(text), self.about["repository"], row)

    def files(self) -> list[Path]:
        return []

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
                place = f"dataset {repository} row {number}"
                if self.text_field not in row:
                    raise UserError(no_field(place, self.text_field, row))
                text = row[self.text_field]
                if text is not None and not isinstance(text, str):
                    raise UserError(no_text(place, self.text_field, text))
                yield Refused(NULL) if text is None else _utf8(text)
        except UserError:
            raise
        except Exception as error:  # as in _load_builder
            raise hub_fault(repository, error) from None


def _utf8(text: str) -> bytes | Refused:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return Refused(LONE_SURROGATE)


@dataclass(frozen=True)
class HubName:
    repository: str
    config: str | None
    revision: str | None


def parse_name(source: str) -> HubName:
    parts = re.fullmatch(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<revision>\S+))?", source)
    if parts is None:
        raise UserError(f"{source!r} does not name a Hub dataset: wanted hf:ORG/NAME[:CONFIG][@REVISION]")
    return HubName(parts["repository"], parts["config"], parts["revision"])


def open_hub(source: str, text_field: str, spool: Path) -> HubParquet | HubStream:
    """Parquet repositories become local files; every other kind is streamed through `datasets`."""
    name = parse_name(source)
    if (fetched := _fetched_copy(name, text_field)) is not None:
        return fetched
    builder, local = _dataset_builder(name.repository, name.config, name.revision)
    urls = train_files(builder, name.repository)
    about = {
        "repository": name.repository,
        "config": builder.config.name,
        "revision": commit_of(urls[0]) or name.revision,
    }
    if not all(url.endswith(".parquet") for url in urls):
        return HubStream(builder, text_field, about, spool)
    if local:
        names = [Path(url).relative_to(local.resolve()).as_posix() for url in urls]
        return HubParquet([Path(url) for url in urls], names, text_field, about)
    return HubParquet(_download(builder, name.repository, urls), [file_of(url) for url in urls], text_field, about)


def remote_builder(name: HubName) -> Any:
    """The builder of the repository on the Hub itself, whatever copy there is."""
    return _load_builder(name.repository, name.repository, name.config, name.revision)


def train_files(builder: Any, repository: str) -> list[str]:
    data_files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if not data_files.get("train"):
        raise UserError(f"dataset {repository} has no split 'train'; the splits there are: {', '.join(data_files)}")
    return data_files["train"]


def commit_of(url: str) -> str | None:
    found = re.search("@([0-9a-f]{40})/", url)
    return found[1] if found else None


def file_of(url: str) -> str:
    """A file's place in its repository."""
    return re.sub("^hf://datasets/[^@]+@[^/]+/", "", url)


def _fetched_copy(name: HubName, text_field: str) -> HubParquet | None:
    """What `pipeline fetch` brought. Raises UserError where that is another config or revision than is wanted."""
    folder = offline_folder()
    records = hub_records(folder, name.repository) if folder else {}
    if not folder or not records:
        return None
    there = f"the copy of {name.repository} in {folder}"
    config = name.config or next(iter(records))
    if config not in records or (name.config is None and len(records) > 1):
        wanted = f"config {name.config}" if name.config else f"one of them, as hf:{name.repository}:CONFIG"
        raise UserError(f"{there} holds the configs {', '.join(records)}; wanted {wanted}; pipeline fetch it")
    record = records[config]
    if re.fullmatch("[0-9a-f]{40}", name.revision or "") and name.revision != record.revision:
        raise UserError(
            f"{there} is revision {record.revision}, wanted {name.revision}: fetch that into another folder, "
            "or name this revision"
        )
    root = folder / name.repository
    record.check(root)
    about = {"repository": name.repository, "config": config, "revision": record.revision}
    logger.info("%s: using what was fetched into %s", name.repository, root)
    return HubParquet([root / file for file in record.files], list(record.files), text_field, about)


def _dataset_builder(repository: str, config: str | None, revision: str | None) -> tuple[Any, Path | None]:
    """The builder that knows the repository's data files, and the local copy it was made from, if any."""
    local = _local_copy(repository)
    if local:
        logger.info("%s: using the local copy at %s", repository, local)
    where = str(local.resolve()) if local else repository
    return _load_builder(repository, where, config, None if local else revision), local


def _load_builder(repository: str, where: str, config: str | None, revision: str | None) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset_builder(where, name=config, revision=revision)
    except Exception as error:  # datasets lets through what the Hub, the network and its own parsers raise
        raise hub_fault(repository, error) from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Hub corpora need the package datasets, which is not installed: pip install 'datasets>=4.0'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Its warnings repeat every retry; what failed in the end is in the error.
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets


def _local_copy(repository: str) -> Path | None:
    folder = offline_folder()
    path = folder / repository if folder else None
    return path if path and path.is_dir() else None


def hub_fault(repository: str, error: Exception) -> UserError:
    cause = one_line(error)
    if "scripts are no longer supported" in cause:
        return UserError(
            f"dataset {repository} comes as a script, and scripts from the Hub are never run here: "
            "choose a repository with data files (Parquet, JSONL), or a revision that has them"
        )
    names = re.search(r"(?:available configs|Available): \[(.*?)\]", cause)
    if names:
        there = names[1].replace("'", "")
        return UserError(f"dataset {repository} wants one of its configs: {there}; write hf:{repository}:CONFIG")
    return UserError(
        f"dataset {repository} could not be opened ({type(error).__name__}: {cause}): check its name and the network, "
        f"or set PIPELINE_HUB_DIR to a folder into which pipeline fetch brought it"
    )


def _download(builder: Any, repository: str, urls: list[str]) -> list[Path]:
    """Bring the files into the cache of `datasets`, which keeps what is there and goes on with what was cut off."""
    datasets = _datasets()
    manager = datasets.DownloadManager(dataset_name=builder.dataset_name, base_path=builder.base_path)
    paths = []
    try:
        with ProgressReport(f"download {repository}", total=len(urls), unit="files") as report:
            for url in urls:
                paths.append(Path(manager.download(url)))
                report.advance(1)
    except Exception as error:  # as in _load_builder
        raise hub_fault(repository, error) from None
    return paths
