"""Where bytes lie: a path of this machine or a URL, opened alike in whichever process reads them.

S3 and other object stores are reached through fsspec, with the credentials that each finds by
itself (such as AWS_* variables); http(s) through requests, which tiktoken needs anyway.
"""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.errors import UserError, one_line
from pipeline.log import printable
from prepare.units import BLOCK_BYTES

# The size of a request: at 4 MB the time to first byte no longer counts.
REQUEST_BYTES = 4 << 20
# Pauses between attempts after a network error; the file systems retry by themselves too.
PAUSES_S = (0.5, 2.0)
TIMEOUT_S = 60
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416
# The extra that installs a protocol; the error of any other protocol names its package.
EXTRAS = {"s3": "s3", "s3a": "s3"}


@dataclass(frozen=True)
class StoredFile:
    """A path or URL, and what is known of the file before it is read; `etag` is the server's.

    Without `ranges`, which some web servers do not serve, it can only be read from its beginning.
    """

    path: str
    size: int
    etag: str | None = None
    ranges: bool = True


def local_file(path: Path) -> StoredFile:
    """A file of this machine; its modification time in ns stands for an ETag."""
    with reading(str(path)):
        found = path.stat()
    return StoredFile(str(path), found.st_size, str(found.st_mtime_ns))


def assets() -> Path:
    """The folder in Hugging Face's cache for what does not come from the Hub.

    It moves with HF_HOME and HF_ASSETS_CACHE, as all of the cache does; it may not exist yet.
    """
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "gpt-pipeline"


def is_url(source: str) -> bool:
    return "://" in source


def name_of(path: str) -> str:
    """The path without a URL's query, so that it ends in its suffixes; a local file may have a ? in
    its name.
    """
    return path.partition("?")[0] if is_url(path) else path


def shown(path: str) -> str:
    """A path or URL for messages and manifests, without a URL's query and user, which may hold
    keys, and with control characters and bytes that are not UTF-8 escaped.
    """
    if is_url(path):
        # Not urlsplit, which takes `zip://a::s3://b` apart wrongly and refuses `http://[`.
        protocol, _, rest = re.split("[?#]", path)[0].partition("://")
        host, slash, name = rest.partition("/")
        path = f"{protocol}://{host.rpartition('@')[2]}{slash}{name}"
    # A name may hold any bytes, which Python keeps as surrogates.
    return printable(os.fsencode(path).decode(errors="backslashreplace"))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns an OSError while `path` is read into a UserError of one line with its name."""
    try:
        yield
    except OSError as error:
        advice = "; check the address, the credentials and the network" if is_url(path) else ""
        raise UserError(f"cannot read {shown(path)}: {error.strerror or one_line(error)}{advice}") from None


def open_bytes(path: str) -> BinaryIO:
    if not is_url(path):
        return Path(path).open("rb")
    found = describe(path)
    file = _RangeFile(path, found.size) if found.ranges else BlockFile(_web_blocks(path))
    return cast(BinaryIO, io.BufferedReader(file, REQUEST_BYTES))


def blocks(path: str, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes [begin, end) of a file, none of the blocks empty."""
    with reading(path), open_bytes(path) as file:
        if begin:
            file.seek(begin)
        while block := file.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - begin)):
            yield block
            begin += len(block)


def describe(url: str) -> StoredFile:
    """Raises OSError where there is no such file."""
    if is_web(url):
        return _describe_web(url)
    system, name = filesystem(url)
    return remote_file(url, _with_retries(url, lambda: system.info(name)))


def remote_file(url: str, info: dict[str, Any]) -> StoredFile:
    known = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime")
    etag = next((str(info[key]).strip('"') for key in known if info.get(key)), None)
    return StoredFile(url, int(info.get("size") or 0), etag)


def is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the file's name there."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    if protocol not in known_implementations or protocol == "memory":
        raise UserError(f"{shown(url)}: unknown file system {protocol!r}; expected s3://, gs://, az://, https://, ...")
    try:
        system, name = url_to_fs(url)
    except ImportError as error:
        missing = f"pip install 'gpt-pipeline[{EXTRAS[protocol]}]'" if protocol in EXTRAS else one_line(error)
        raise UserError(f"{protocol}:// needs a package that is not installed: {missing}") from None
    except Exception as error:  # each file system refuses an address in its way
        raise UserError(f"{shown(url)} cannot be opened: {one_line(error)}") from None
    return system, str(name)


class _RangeFile(io.RawIOBase):
    """A file behind a URL, read in ranges: an error costs one range again, and only the last range
    is held.
    """

    def __init__(self, url: str, size: int) -> None:
        self._fetch = _web_range(url) if is_web(url) else _fsspec_range(url)
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        # io.BufferedReader asks for REQUEST_BYTES at a time, whatever its caller reads.
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        content = _with_retries(self._url, lambda: self._fetch(self._at, end))
        if len(content) != end - self._at:
            raise OSError(f"got {len(content)} bytes for the range {self._at} to {end}: did the file change?")
        buffer[: len(content)] = content
        self._at = end
        return len(content)


def _with_retries(url: str, ask: Callable[[], Any]) -> Any:
    """The answer to a request, retried after an error.

    Raises OSError, which the callers of a file's methods expect.
    """
    for pause in (*PAUSES_S, None):
        try:
            return ask()
        except (FileNotFoundError, PermissionError) as error:
            raise OSError(_description(error, url)) from None
        except UserError:
            raise
        except Exception as error:  # what botocore, aiohttp, requests and others raise has no common kind
            if pause is None:
                raise OSError(_description(error, url)) from None
            time.sleep(pause)
    raise AssertionError("unreachable")


def _description(error: Exception, url: str) -> str:
    secret = url.partition("?")[2]
    text = f"{type(error).__name__}: {one_line(error)}".replace(url, shown(url))
    return text.replace(secret, "...") if secret else text


def _fsspec_range(url: str) -> Callable[[int, int], bytes]:
    system, name = filesystem(url)
    return lambda begin, end: bytes(system.cat_file(name, start=begin, end=end))


@cache
def _web() -> Any:
    import requests

    # One session for the process: it keeps connections open, and a handshake costs as much as a
    # small range.
    session = requests.Session()
    # Bytes as they are stored: a range of a compressed transfer is useless.
    session.headers["Accept-Encoding"] = "identity"
    return session


def _answer(method: str, url: str, **options: Any) -> Any:
    answer = _web().request(method, url, timeout=TIMEOUT_S, allow_redirects=True, **options)
    if answer.status_code in (401, 403, 404, 410):  # another attempt would not help
        raise FileNotFoundError(f"{answer.status_code} {answer.reason}")
    if answer.status_code != RANGE_NOT_SATISFIABLE:  # an empty file has no first byte
        answer.raise_for_status()
    return answer


def _web_range(url: str) -> Callable[[int, int], bytes]:
    return lambda begin, end: bytes(_answer("GET", url, headers={"Range": f"bytes={begin}-{end - 1}"}).content)


def _describe_web(url: str) -> StoredFile:
    """By a request for its first byte: URLs signed for GET refuse HEAD, and only an answer proves
    that ranges work.
    """
    with _with_retries(url, lambda: _answer("GET", url, headers={"Range": "bytes=0-0"}, stream=True)) as answer:
        headers = answer.headers
    etag = headers.get("ETag") or headers.get("Last-Modified")
    total = headers.get("Content-Range", "").rpartition("/")[2]
    ranges = answer.status_code == PARTIAL_CONTENT and total.isdecimal()
    size = int(total) if ranges else int(headers.get("Content-Length", 0))
    return StoredFile(url, size if answer.ok else 0, etag and etag.strip('"'), ranges)


def _web_blocks(url: str) -> Iterator[bytes]:
    """The body of an answer, which must have its announced length: a connection that breaks off is
    an error.
    """
    with _with_retries(url, lambda: _answer("GET", url, stream=True)) as answer:
        left = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        while True:
            try:
                block = answer.raw.read(BLOCK_BYTES)
            except Exception as error:  # urllib3 raises its own kinds
                raise OSError(f"the connection broke off ({type(error).__name__})") from None
            if not block:
                break
            left = left and left - len(block)
            yield block
        if left:
            raise OSError(f"the connection broke off {left} bytes before the end")


class BlockFile(io.RawIOBase):
    """Blocks of bytes as a file, for libraries that read one; what the blocks raise passes through."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
