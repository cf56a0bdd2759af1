"""Parquet files of a dataset of the Hub, by their names in its repository, downloaded while they are
read.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from pipeline.errors import UserError, one_line
from prepare.sources.items import Source
from prepare.storage.files import StoredFile, local_file
from prepare.units import Reading

# The modification time of what is downloaded here, so that a stamp says when a file was edited and
# not when it came: 1 s after 1970, as everything has in the store of Nix.
DOWNLOADED_NS = 1_000_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class HubName:
    """A dataset of the Hub: as the user typed it, or with its config and commit."""

    repository: str
    config: str | None
    revision: str | None


@dataclass(frozen=True)
class HubParquet(Source):
    """Parquet files of a repository, by their paths there, each with its size in bytes.

    They are downloaded into Hugging Face's cache in their order, the next one while the one before
    is read.
    """

    dataset: HubName
    sizes: dict[str, int]
    has_splits: bool = field(default=True, kw_only=True, repr=False)

    def ready(self, files: list[StoredFile]) -> Iterator[StoredFile]:
        return (file for file, _ in zip(files, self.downloaded(), strict=True))

    def files(self) -> list[Path]:
        """All of them, once they are in the cache. Raises UserError if one cannot be had."""
        return [Path(file.path) for file in self.downloaded()]

    def stored(self) -> list[StoredFile]:
        return [self._stored(name) for name in self.sizes]

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return record_files(self.dataset, self.sizes, lambda name: hash_of(self.path(name)))

    def path(self, name: str) -> Path:
        """Where huggingface_hub keeps a file, or will."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=self.dataset.repository, repo_type="dataset")
        return Path(constants.HF_HUB_CACHE, folder, "snapshots") / str(self.dataset.revision) / name

    def _stored(self, name: str) -> StoredFile:
        # A file that is yet to come is given this time by the download, so that the stamp holds.
        path = self.path(name)
        known = local_file(path) if path.exists() else StoredFile(str(path), self.sizes[name], str(DOWNLOADED_NS))
        return replace(known, etag=f"{self.dataset.revision} {known.etag}")

    def downloaded(self) -> Iterator[StoredFile]:
        """The files in order, the next one being downloaded while the caller reads one."""
        names = list(self.sizes)
        coming = [_in_background(partial(self._download, name)) for name in names[:1]]
        for number in range(len(names)):
            file = coming.pop().result()
            coming = [_in_background(partial(self._download, name)) for name in names[number + 1 : number + 2]]
            yield file

    def _download(self, name: str) -> StoredFile:
        from huggingface_hub import hf_hub_download

        dataset, known = self.dataset, self.path(name).exists()
        try:
            path = hf_hub_download(dataset.repository, name, repo_type="dataset", revision=dataset.revision)
            if not known:
                os.utime(path, ns=(DOWNLOADED_NS, DOWNLOADED_NS))
        except Exception as error:  # what the Hub, the network and the cache raise has no common kind
            split = "" if self.reading.split == Reading.split else f" --split {self.reading.split}"
            raise UserError(
                f"{name} of dataset {dataset.repository} is not in the cache and could not be downloaded "
                f"({cause_of(error)}): run pipeline fetch hf:{dataset.repository}:{dataset.config}@{dataset.revision}{split} "
                "on a machine with a network"
            ) from None
        return self._stored(name)


def _in_background(call: Callable[[], T]) -> Future[T]:
    """The result of a call in a thread that does not keep the program from ending."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # it belongs to whoever asks for the result
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def record_files(name: HubName, sizes: dict[str, int], hash_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """The manifest's entries for files of a dataset, by their paths in the repository."""
    return [{**asdict(name), "path": file, "bytes": size, "hash": hash_of(file)} for file, size in sizes.items()]


def cause_of(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
