"""Tensors of safetensors files, checked by name, shape and type before any is read.

The library checks that a header is complete, and that its tensors fill the file without holes or
overlaps; what it leaves open is checked here. Files are mapped, so a tensor takes memory when it is
read and not before.
"""

import errno
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.layout import Shapes
from pipeline.errors import UserError
from pipeline.files import parse_json, read_limited

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 1 << 24  # 100 bytes a tensor: 13,000 layers; the library alone would parse 100 MB
MOST_LISTED = 5  # names of tensors in an error
READABLE = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file, which closes when the last of its tensors is dropped."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """The library's error for a full disk and the like, while `path` is written, as the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or those that an index names. Raises UserError
    where there are none.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: only safetensors are read, pickled weights (.bin, .pt) never")
    try:
        document = parse_json(read_limited(folder / INDEX, MOST_HEADER_BYTES))
        names = sorted(set(document["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({type(error).__name__}): expected a weight_map") from None
    for name in names:
        # A plain name: an index must not lead out of its folder.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name)):
            raise UserError(f"{folder / INDEX} names the file {str(name)[:80]!r}, expected .safetensors next to it")
        if not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name}, which does not exist: copy the folder again")
    return [folder / name for name in names]


def open_tensors(files: Iterable[Path], rename: Callable[[str], str] = str) -> dict[str, Stored]:
    """The tensors of safetensors files by their renamed names. Raises UserError for damage, and for
    a name that occurs twice.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        _check_header_size(path)
        try:
            file: Any = safe_open(path, framework="pt")
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, MemoryError) as error:  # the last from a file too large to be mapped
            raise UserError(f"{path} is not a complete safetensors file: {error}") from None
        for name, view in views.items():
            renamed = rename(name)
            # Shards may overlap, and an old name may stand next to its new one: which is right?
            if renamed in stored:
                raise UserError(f"{path} holds the tensor {renamed} a second time: save the model again")
            stored[renamed] = Stored(file, name, tuple(view.get_shape()), view.get_dtype())
    return stored


def check_tensors(where: Path, expected: Shapes, found: dict[str, Stored], ignored: Collection[str] = ()) -> None:
    """Raises UserError unless `found` is what is expected, in shape and type, and nothing else but
    `ignored`.
    """
    pairs = [(name, found[name], shape) for name, shape in expected.items() if name in found]
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys() - set(ignored)),
        "of another shape": [f"{name} is {t.shape}, expected {shape}" for name, t, shape in pairs if t.shape != shape],
        "not float32, bfloat16 or float16": [f"{name} is {t.dtype}" for name, t, _ in pairs if t.dtype not in READABLE],
    }
    listed = [
        f"{fault}: {', '.join(names[:MOST_LISTED])}{' ...' if len(names) > MOST_LISTED else ''}"
        for fault, names in faults.items()
        if names
    ]
    if listed:
        raise UserError(f"{where} does not fit the model: {'; '.join(listed)}")


def _check_header_size(path: Path) -> None:
    if not path.is_file():  # to open a pipe would wait for a writer
        raise UserError(f"{path} is not a file: expected tensors as safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER_BYTES:
        raise UserError(f"{path} has a header of {length:,} bytes, expected up to {MOST_HEADER_BYTES:,}: it is damaged")
