"""Where text comes from: a source named by the user becomes small units of work, each of which yields its documents.

A unit is about 1 MB of text, can be pickled, and knows how to read itself, so worker processes read what they encode
and the parent only plans. Planning order is the corpus's order. A document is a str; None stands for a table's null.
"""

import logging
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import orjson

from pipeline.errors import UserError
from pipeline.files import hash_bytes

# Large enough that the cost of handing a unit to a process (about 1 ms) is lost in encoding it (about 70 ms), small
# enough that the workers come to the end together: 100 MB by two workers took 2 % longer with 4 MB.
UNIT_BYTES = 1 << 20
# A column of equal rows shrinks to nothing in Parquet's dictionary; this bounds what one unit can unfold to.
UNIT_ROWS = 8192
# Folders with more files are recorded in the manifest as one entry.
MOST_FILES_LISTED = 1000

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
OPENWEBTEXT = "hf:Skylion007/openwebtext@b4325f019c648b1641a1784748667e8b74e5e064"
OPENWEBTEXT_VAL_FRACTION = 0.0005  # nanoGPT's share: about 4.4 M of 9 G tokens
SOURCE_KINDS = (
    f"a file ({' '.join(SUFFIXES)}), a folder or a glob of those, stdlib, openwebtext, "
    "hf:ORG/NAME[:CONFIG][@REVISION], or - for stdin"
)
# Not in the embedded corpus: installed packages, tests, and folders that are tables or differ between Python versions.
STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
STDIN_SPOOL = "stdin.partial"


class Unit(Protocol):
    @property
    def size(self) -> int:
        """Bytes of text, as near as they are known before reading."""
        ...

    def documents(self) -> Iterator[str | None]: ...


class Source(Protocol):
    def units(self) -> Iterable[Unit]:
        """The same units in the same order every time; a list where they are known before any text is read."""
        ...

    def files(self) -> list[Path]:
        """The local files whose hashes `record` asks for."""
        ...

    def file_bytes(self) -> int | None: ...

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """What the manifest says of this source."""
        ...


@dataclass(frozen=True)
class Corpus:
    """All sources of one dataset, in the order given."""

    sources: list[Source]
    val_fraction: float | None = None

    def units(self) -> Iterable[Unit]:
        planned = [source.units() for source in self.sources]
        if all(isinstance(units, list) for units in planned):
            return list(chain.from_iterable(planned))
        return chain.from_iterable(planned)

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]

    def file_bytes(self) -> int | None:
        """Bytes of all source files; None where one of them is a stream."""
        sizes = [source.file_bytes() for source in self.sources]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [entry for source in self.sources for entry in source.record(hash_of)]


def open_corpus(sources: list[str], text_field: str, folder: Path) -> Corpus:
    """Resolve what the user typed; `folder` is where stdin would be spooled. Raises UserError for what is not there."""
    if not sources:
        raise UserError(f"no source given: wanted {SOURCE_KINDS}")
    if sources.count("-") > 1:
        raise UserError("stdin (-) is named twice as a source: it can be read only once")
    own_fraction = OPENWEBTEXT_VAL_FRACTION if sources == ["openwebtext"] else None
    return Corpus([_open_source(source, text_field, folder) for source in sources], own_fraction)


def default_name(source: str) -> str:
    """A dataset's name from its first source: a named corpus's own, else the stem of what was named."""
    if source in ("stdlib", "openwebtext"):
        return source
    if source == "-":
        return "stdin"
    if source.startswith("hf:"):
        stem = re.split("[:@]", source[3:])[0].rpartition("/")[2].lower()
    elif _is_glob(source):
        plain = [part for part in source.split("/") if not _is_glob(part)]
        stem = plain[-1] if plain else ""
    else:
        path = Path(source).resolve()
        stem = path.name if path.is_dir() else path.stem
    return re.sub("[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "corpus"


def _open_source(source: str, text_field: str, folder: Path) -> Source:
    if source == "stdlib":
        return _open_stdlib(text_field)
    if source == "-":
        return Stdin(text_field, folder / STDIN_SPOOL)
    if source == "openwebtext" or source.startswith("hf:"):
        return _open_hub(OPENWEBTEXT if source == "openwebtext" else source, text_field)
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{source} has the unknown suffix {path.suffix!r}: wanted one of {' '.join(SUFFIXES)}")
        return Files([path], text_field)
    if path.is_dir():
        return Files(_readable(_walk(path), f"the folder {source}"), text_field, root=path)
    if _is_glob(source):
        # Path.glob takes no absolute pattern.
        found = sorted(Path(match) for match in glob(source, recursive=True))  # noqa: PTH207
        return Files(_readable(found, f"the glob {source}"), text_field)
    raise UserError(f"no source {source!r}: it is no file, folder or named corpus; wanted {SOURCE_KINDS}")


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def _walk(folder: Path, without: Set[str] = frozenset()) -> list[Path]:
    """Every file below `folder` by its path; folders `without`, and hidden ones (.git, .cache), are not entered."""
    paths = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _readable(paths: list[Path], what: str) -> list[Path]:
    known = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not known:
        found = sorted({path.suffix or path.name for path in paths if path.is_file()})
        listing = f"only {' '.join(found[:8])}" if found else "no files"
        raise UserError(f"{what} holds nothing readable, found {listing}: wanted files of {' '.join(SUFFIXES)}")
    return known


def _open_stdlib(text_field: str) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    wanted = [path for path in _walk(root, STDLIB_WITHOUT) if path.suffix == ".py"]
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return Files(wanted, text_field, root=root, about={"path": "stdlib", "python": python})


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Local files of known suffixes, below `root` where they are a folder's. `about` marks a corpus recorded as one."""

    paths: list[Path]
    text_field: str
    root: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def units(self) -> list[Unit]:
        return list(_plan(self.paths, self.text_field))

    def files(self) -> list[Path]:
        return self.paths

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        if self.root is None or (not self.about and len(self.paths) <= MOST_FILES_LISTED):
            return [{"path": str(path), "bytes": path.stat().st_size, "hash": hash_of(path)} for path in self.paths]
        listing = "".join(f"{path.relative_to(self.root).as_posix()}\t{hash_of(path)}\n" for path in self.paths)
        total = {"files": len(self.paths), "bytes": self.file_bytes(), "hash": hash_bytes(listing.encode())}
        return [{"path": str(self.root), **self.about, **total}]


def _plan(paths: list[Path], text_field: str) -> Iterator[Unit]:
    batch: list[str] = []
    batch_size = 0
    for path in paths:
        if path.suffix.lower() in (".jsonl", ".parquet"):
            if batch:
                yield TextFiles(tuple(batch), batch_size)
                batch, batch_size = [], 0
            yield from (_plan_lines if path.suffix.lower() == ".jsonl" else _plan_parquet)(path, text_field)
            continue
        batch.append(str(path))
        batch_size += path.stat().st_size
        if batch_size >= UNIT_BYTES:
            yield TextFiles(tuple(batch), batch_size)
            batch, batch_size = [], 0
    if batch:
        yield TextFiles(tuple(batch), batch_size)


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decode(content: bytes, path: str, offset: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at byte offset {offset + error.start} "
            f"({error.reason}); convert it to UTF-8, for example with iconv"
        ) from None


@dataclass(frozen=True)
class TextFiles:
    """Whole files, each one document."""

    paths: tuple[str, ...]
    size: int

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            yield _decode(_read_bytes(path), path)


# ---- lines -----------------------------------------------------------------------------------------------------------


def _plan_lines(path: Path, text_field: str | None) -> Iterator[Unit]:
    end = path.stat().st_size
    for start in range(0, end, UNIT_BYTES):
        yield Lines(str(path), start, min(start + UNIT_BYTES, end), text_field)


@dataclass(frozen=True)
class Lines:
    """The lines of a file that begin in bytes [start, stop), so that neighbours share no line and leave none out.

    With a text field a line is a JSON object (JSONL; blank lines are no documents), without one it is the document.
    """

    path: str
    start: int
    stop: int
    text_field: str | None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[str | None]:
        for begin, line in self._lines():
            if self.text_field is None:
                yield _decode(line.removesuffix(b"\r"), self.shown, begin)
            elif line.strip():
                yield self._from_json(begin, line)

    @property
    def shown(self) -> str:
        return "stdin" if Path(self.path).name == STDIN_SPOOL else self.path

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with Path(self.path).open("rb") as file:
                begin = self.start
                if begin:
                    # From the byte before: where that is a line's end, the line at `start` is ours.
                    file.seek(begin - 1)
                    begin += len(file.readline()) - 1
                content = file.read(max(self.stop - begin, 0))
                if content and not content.endswith(b"\n"):
                    content += file.readline()
        except OSError as error:
            raise UserError(f"cannot read {self.shown}: {error.strerror}") from None
        for line in content.removesuffix(b"\n").split(b"\n") if content else ():
            yield begin, line
            begin += len(line) + 1

    def _from_json(self, begin: int, line: bytes) -> str | None:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            _decode(line, f"{self.shown} line {self._number(begin)}", begin)
            raise UserError(
                f"{self._place(begin)} is not JSON ({error}): wanted one object a line, "
                f'such as {{"{self.text_field}": "..."}}'
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{self._place(begin)} is not a JSON object but {_shorten(line)}: wanted one object a line")
        if self.text_field not in row:
            raise UserError(_no_field(self._place(begin), str(self.text_field), row))
        text = row[self.text_field]
        if text is not None and not isinstance(text, str):
            raise UserError(_no_text(self._place(begin), str(self.text_field), text))
        return text

    def _place(self, begin: int) -> str:
        return f"{self.shown} line {self._number(begin)}"

    def _number(self, begin: int) -> int:
        """Counted only when an error needs it: units know bytes, people know lines."""
        with Path(self.path).open("rb") as file:
            blocks = (file.read(min(UNIT_BYTES, begin - at)) for at in range(0, begin, UNIT_BYTES))
            return 1 + sum(block.count(b"\n") for block in blocks)


def _shorten(content: bytes) -> str:
    text = content.decode().strip()
    return text if len(text) <= 40 else text[:40] + "..."


def _no_field(place: str, text_field: str, row: Iterable[str]) -> str:
    there = ", ".join(row) or "none"
    return f"{place} has no field {text_field!r}; the fields there are: {there}; choose one with --text-field"


def _no_text(place: str, text_field: str, value: Any) -> str:
    return (
        f"{place}: the field {text_field!r} holds {type(value).__name__}, wanted text; choose another with --text-field"
    )


class Stdin:
    """Standard input, kept in a file so that it can be read more than once, and by several processes.

    Where its first line that is not blank is a JSON object it is JSONL, else every line is a document.
    """

    def __init__(self, text_field: str, spool: Path) -> None:
        self.text_field, self.spool = text_field, spool

    def units(self) -> list[Unit]:
        with self._spooled.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
        return list(_plan_lines(self._spooled, self.text_field if _is_json_object(first) else None))

    def files(self) -> list[Path]:
        return [self._spooled]

    def file_bytes(self) -> int:
        return self._spooled.stat().st_size

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [{"path": "-", "bytes": self.file_bytes(), "hash": hash_of(self._spooled)}]

    @cached_property
    def _spooled(self) -> Path:
        with self.spool.open("wb") as file:
            while block := sys.stdin.buffer.read(UNIT_BYTES):
                file.write(block)
        return self.spool


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet_file(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered and not pre-buffered: otherwise a whole column chunk, often the whole file, is held in memory.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} as Parquet: {_one_line(error)}; fetch or write it again") from None


def _plan_parquet(path: Path, text_field: str) -> Iterator[Unit]:
    with _parquet_file(str(path)) as file:
        _check_text_column(file.schema_arrow, path, text_field)
        for group in range(file.metadata.num_row_groups):
            meta = file.metadata.row_group(group)
            chunks = (meta.column(i) for i in range(meta.num_columns))
            size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_field)
            rows = meta.num_rows
            at_once = max(1, min(UNIT_ROWS, UNIT_BYTES * rows // max(size, 1)))
            for start in range(0, rows, at_once):
                stop = min(start + at_once, rows)
                yield ParquetRows(str(path), text_field, group, start, stop, at_once, size * (stop - start) // rows)


def _check_text_column(schema: Any, path: Path, text_field: str) -> None:
    import pyarrow.types as kinds

    if text_field not in schema.names:
        there = ", ".join(schema.names)
        raise UserError(
            f"{path} has no column {text_field!r}; the columns there are: {there}; choose with --text-field"
        )
    kind = schema.field(text_field).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(value) or kinds.is_large_string(value) or kinds.is_string_view(value)):
        raise UserError(
            f"{path}: the column {text_field!r} holds {kind}, wanted text; choose another with --text-field"
        )


@dataclass(frozen=True)
class ParquetRows:
    """Rows [start, stop) of one row group. `batch` is the step in which the row group is read."""

    path: str
    column: str
    group: int
    start: int
    stop: int
    batch: int
    size: int

    def documents(self) -> Iterator[str | None]:
        import pyarrow

        try:
            yield from _row_group(self.path, self.column, self.group, self.batch).read(self.start, self.stop)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"cannot read {self.path} as Parquet: {_one_line(error)}; fetch or write it again"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: the column {self.column!r} is not UTF-8 in row group {self.group}, rows {self.start} to "
                f"{self.stop}: byte 0x{error.object[error.start]:02x} at byte offset {error.start} of the text"
            ) from None


class _RowGroup:
    """A place in one row group. Skipping rows costs as much as reading them, and pq.write_table's groups have 1 M rows.

    Later units of a group lie further on, so a process that keeps its place reads each group once, not once a unit.
    """

    def __init__(self, path: str, column: str, group: int, batch: int) -> None:
        self._file = _parquet_file(path)
        self._options = {"batch_size": batch, "row_groups": [group], "columns": [column], "use_threads": False}
        self._rows: Any
        self._rewind()

    def read(self, start: int, stop: int) -> Iterator[str | None]:
        if start < self._begin:
            self._rewind()
        while True:
            first, last = max(start - self._begin, 0), stop - self._begin
            if first < len(self._rows):
                yield from self._rows[first:last].to_pylist()
            if last <= len(self._rows):
                return
            self._begin += len(self._rows)
            self._rows = next(self._batches).column(0)

    def _rewind(self) -> None:
        self._batches = self._file.iter_batches(**self._options)
        self._begin = 0
        self._rows = next(self._batches).column(0)


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int, batch: int) -> _RowGroup:
    return _RowGroup(path, column, group, batch)


# ---- the Hugging Face Hub --------------------------------------------------------------------------------------------


def _open_hub(source: str, text_field: str) -> Source:
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


@dataclass(frozen=True)
class HubParquet:
    """Parquet files of a Hub repository on the local disk. The cache names them anew, so `names` holds their places."""

    paths: list[Path]
    names: list[str]
    text_field: str
    about: dict[str, Any]

    def units(self) -> list[Unit]:
        return [unit for path in self.paths for unit in _plan_parquet(path, self.text_field)]

    def files(self) -> list[Path]:
        return self.paths

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [
            {**self.about, "path": name, "bytes": path.stat().st_size, "hash": hash_of(path)}
            for name, path in zip(self.names, self.paths, strict=True)
        ]


def _dataset_builder(repository: str, config: str | None, revision: str | None) -> tuple[Any, Path | None]:
    """The builder that knows the repository's data files, and the local copy it was made from, if any."""
    from pipeline.log import logger

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
    cause = _one_line(error)
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
    from pipeline.log import ProgressReport  # here: its terminal library would cost every worker 30 ms at its start

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


@dataclass(frozen=True)
class Stream:
    """A Hub dataset that is not Parquet: the parent reads it through `datasets` and packs the texts into units."""

    builder: Any
    text_field: str
    about: dict[str, Any]

    def units(self) -> Iterator[Unit]:
        batch: list[str | None] = []
        size = 0
        for text in self._texts():
            batch.append(text)
            size += len(text or "")
            if size >= UNIT_BYTES or len(batch) >= UNIT_ROWS:
                yield Texts(tuple(batch), size)
                batch, size = [], 0
        if batch:
            yield Texts(tuple(batch), size)

    def files(self) -> list[Path]:
        return []

    def file_bytes(self) -> int | None:
        return None

    def record(self, hash_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        return [self.about]

    def _texts(self) -> Iterator[str | None]:
        repository = self.about["repository"]
        try:
            for number, row in enumerate(self.builder.as_streaming_dataset(split="train"), start=1):
                place = f"dataset {repository} row {number}"
                if self.text_field not in row:
                    raise UserError(_no_field(place, self.text_field, row))
                text = row[self.text_field]
                if text is not None and not isinstance(text, str):
                    raise UserError(_no_text(place, self.text_field, text))
                yield text
        except UserError:
            raise
        except Exception as error:  # as in _dataset_builder
            raise _hub_fault(repository, error) from None


@dataclass(frozen=True)
class Texts:
    """Documents that were already read."""

    texts: tuple[str | None, ...]
    size: int

    def documents(self) -> Iterator[str | None]:
        yield from self.texts


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
