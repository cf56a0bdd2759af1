"""Datasets of the Hugging Face Hub: Parquet repositories become local files, every other kind is streamed.

Only names and data cross from the Hub: a repository's own program is never run.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.log import ProgressReport, logger
from prepare.parquet import MOST_ROWS, plan_parquet
from prepare.readers import NULL, SMALLEST_UNIT_BYTES, Document, Item, Refused, Texts, no_field, no_text, one_line


@dataclass(frozen=True)
class HubParquet:
    """Parquet files of a Hub repository on the local disk. The cache names them anew, so `names` holds their places."""

    paths: list[Path]
    names: list[str]
    text_field: str
    about: dict[str, Any]

    def items(self, unit_bytes: int) -> list[Item]:
        return [unit for path in self.paths for unit in plan_parquet(path, self.text_field, unit_bytes)]

    def files(self) -> list[Path]:
        return self.paths

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def stamps(self) -> dict[str, Any]:
        return {
            name: [self.about["revision"], path.stat().st_size]
            for name, path in zip(self.names, self.paths, strict=True)
        }

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [
            {**self.about, "path": name, "bytes": path.stat().st_size, "hash": hash_of(path)}
            for name, path in zip(self.names, self.paths, strict=True)
        ]


@dataclass(frozen=True)
class Stream:
    """A Hub dataset that is not Parquet: the parent reads it through `datasets` and packs the texts into units."""

    builder: Any
    text_field: str
    about: dict[str, Any]

    size = 0

    def items(self, unit_bytes: int) -> list[Item]:
        return [self]

    def units(self) -> Iterator[Texts]:
        batch: list[Document] = []
        size = first = 0
        for text in self._texts():
            batch.append(Refused(NULL) if text is None else text.encode())
            size += len(text or "")
            if size >= SMALLEST_UNIT_BYTES or len(batch) >= MOST_ROWS:
                yield Texts(tuple(batch), size, self.about["repository"], first)
                first += len(batch)
                batch, size = [], 0
        if batch:
            yield Texts(tuple(batch), size, self.about["repository"], first)

    def files(self) -> list[Path]:
        return []

    def file_bytes(self) -> int | None:
        return None

    def stamps(self) -> dict[str, Any]:
        return {self.about["repository"]: self.about["revision"]}

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [self.about]

    def _texts(self) -> Iterator[str | None]:
        repository = self.about["repository"]
        try:
            for number, row in enumerate(self.builder.as_streaming_dataset(split="train"), start=1):
                place = f"dataset {repository} row {number}"
                if self.text_field not in row:
                    raise UserError(no_field(place, self.text_field, row))
                text = row[self.text_field]
                if text is not None and not isinstance(text, str):
                    raise UserError(no_text(place, self.text_field, text))
                yield text
        except UserError:
            raise
        except Exception as error:  # as in _dataset_builder
            raise _hub_fault(repository, error) from None


def open_hub(source: str, text_field: str) -> HubParquet | Stream:
    """Parquet repositories become local files; every other kind is streamed through `datasets`."""
    parts = re.fullmatch(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<revision>\S+))?", source)
    if parts is None:
        raise UserError(f"{source!r} does not name a Hub dataset: wanted hf:ORG/NAME[:CONFIG][@REVISION]")
    repository, config, revision = parts["repository"], parts["config"], parts["revision"]
    builder, local = _dataset_builder(repository, config, revision)
    data_files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    if not data_files.get("train"):
        raise UserError(f"dataset {repository} has no split 'train'; the splits there are: {', '.join(data_files)}")
    urls = data_files["train"]
    resolved = re.search("@([0-9a-f]{40})/", urls[0])
    about = {
        "repository": repository,
        "config": builder.config.name,
        "revision": resolved[1] if resolved else revision,
    }
    if not all(url.endswith(".parquet") for url in urls):
        return Stream(builder, text_field, about)
    if local:
        names = [Path(url).relative_to(local.resolve()).as_posix() for url in urls]
        return HubParquet([Path(url) for url in urls], names, text_field, about)
    names = [re.sub("^hf://datasets/[^@]+@[^/]+/", "", url) for url in urls]
    return HubParquet(_download(builder, repository, urls), names, text_field, about)


def _dataset_builder(repository: str, config: str | None, revision: str | None) -> tuple[Any, Path | None]:
    """The builder that knows the repository's data files, and the local copy it was made from, if any."""
    datasets = _datasets()
    local = _local_copy(repository)
    if local:
        logger.info("%s: using the local copy at %s", repository, local)
    try:
        where = str(local.resolve()) if local else repository
        return datasets.load_dataset_builder(where, name=config, revision=None if local else revision), local
    except Exception as error:  # datasets lets through what the Hub, the network and its own parsers raise
        raise _hub_fault(repository, error) from None


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
    hub_dir = os.environ.get("PIPELINE_HUB_DIR")
    path = Path(hub_dir, repository) if hub_dir else None
    return path if path and path.is_dir() else None


def _hub_fault(repository: str, error: Exception) -> UserError:
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
        f"or set PIPELINE_HUB_DIR to a folder that holds {repository}, as huggingface-cli download --local-dir makes it"
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
    except Exception as error:  # as in _dataset_builder
        raise _hub_fault(repository, error) from None
    return paths
