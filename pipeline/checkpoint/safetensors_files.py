"""Tensors of safetensors files, read only after names, shapes and types were found to be what is wanted.

The library checks that a header is whole, and that its tensors fill the file without holes or overlaps; what it leaves
open is checked here. Files are mapped, so a tensor takes memory when it is read and not before.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import read_limited

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 1 << 24  # 100 bytes a tensor: 13,000 layers; the library alone would parse 100 MB
READABLE = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or those that an index names. Raises UserError where there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: only safetensors are read, pickled weights (.bin, .pt) never")
    try:
        document = orjson.loads(read_limited(folder / INDEX, MOST_HEADER_BYTES))
        names = sorted(set(document["weight_map"].values()))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({type(error).__name__}): wanted a weight_map") from None
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name)):
            raise UserError(
                f"{folder / INDEX} names the file {str(name)[:80]!r}, wanted names of .safetensors beside it"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name}, which is not there: copy the whole folder again")
    return [folder / name for name in names]


@contextmanager
def opened(files: Collection[Path]) -> Iterator[dict[str, Stored]]:
    """The tensors of safetensors files by their full names. Raises UserError for damage, and for a name that is there twice."""
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for path in files:
            _check_header_size(path)
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                names = list(file.keys())
                slices = [file.get_slice(name) for name in names]
            except (SafetensorError, OSError, MemoryError) as error:  # the last from a file too large to be mapped
                raise UserError(f"{path} is not a whole safetensors file: {error}") from None
            for name, view in zip(names, slices, strict=True):
                if _full_name(name) in stored:
                    raise UserError(f"{path} holds the tensor {_full_name(name)} a second time: save the model again")
                stored[_full_name(name)] = Stored(file, name, tuple(view.get_shape()), view.get_dtype())
        yield stored


def check(where: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, Stored]) -> None:
    """Raises UserError unless `found` has all that is wanted, in its shape, as numbers that are read, and nothing else."""
    # Old files carry the causal mask, and a tied head, as tensors of their own.
    known = {name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))}
    if "lm_head.weight" not in wanted:
        known.add("lm_head.weight")
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys() - known)
    there = [(name, found[name], shape) for name, shape in wanted.items() if name in found]
    faults = [
        f"{title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for title, names in (
            ("missing", missing),
            ("unknown", unknown),
            (
                "of another shape",
                [f"{name} is {at.shape}, wanted {want}" for name, at, want in there if at.shape != want],
            ),
            (
                "not float32, bfloat16 or float16",
                [f"{n} is {at.dtype}" for n, at, _ in there if at.dtype not in READABLE],
            ),
        )
        if names
    ]
    if faults:
        raise UserError(f"{where} does not fit the model: {'; '.join(faults)}")


def fill(
    where: Path, files: list[Path], wanted: dict[str, tuple[int, ...]], take: Callable[[str, Tensor], object]
) -> None:
    """Hand every wanted tensor to `take`, after all were checked."""
    with opened(files) as stored, torch.no_grad():
        check(where, wanted, stored)
        for name in wanted:
            take(name, stored[name].read())


def _check_header_size(path: Path) -> None:
    if not path.is_file():  # to open a pipe would wait for a writer
        raise UserError(f"{path} is not a file: wanted tensors as safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER_BYTES:
        raise UserError(f"{path} has a header of {length:,} bytes, wanted up to {MOST_HEADER_BYTES:,}: it is damaged")


def _full_name(name: str) -> str:
    """OpenAI's own GPT-2 files leave the leading "transformer." out."""
    return f"transformer.{name}" if re.match(r"(wte|wpe|h\.\d+|ln_f)\.", name) else name
