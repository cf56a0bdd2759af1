"""A checkpoint: a folder that exists only when complete, and that is a Hugging Face model folder as
it stands.

    runs/<name>/checkpoints/step_00001000/
        config.json model.safetensors tokenizer.json ...      what Hugging Face reads
        [vocabulary.*]                                        what our tokenizer reads, where that is another file
        training_state.safetensors                            the optimizer's state
        checkpoint.json                                       written last: the description below, all files' hashes, its own
    runs/<name>/checkpoints/latest, best, branch              one line each: a folder's name
    runs/<name>/checkpoints/average/                          made by --ckpt average: no training_state

There is no random state to save: the order of the data and every dropout mask follow from the seed
and the step. There is no pickle anywhere, so loading a checkpoint executes nothing.
"""

import re
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

import pipeline
from pipeline.checkpoint.layouts import layout_of
from pipeline.checkpoint.pointers import set_pointer
from pipeline.checkpoint.safetensors_files import WEIGHTS, as_os_error
from pipeline.errors import UserError
from pipeline.files import (  # fmt: skip
    check_types,
    dump_json,
    hash_bytes,
    hash_file,
    is_plain_name,
    parse_json,
    publish,
    read_limited,
    sync,
    write_atomic,
)  # fmt: skip
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import gather
from pipeline.runs import Position
from pipeline.vocabulary.huggingface_files import tokenizer_files
from pipeline.vocabulary.specs import check_spec
from pipeline.vocabulary.tokenizer import Tokenizer

FORMAT_VERSION = 1
CONFIG = "config.json"
DESCRIPTION = "checkpoint.json"
TRAINING_STATE = "training_state.safetensors"
MOST_DESCRIPTION_BYTES = 1 << 23  # a `char` vocabulary of every Unicode character takes five megabytes
MOST_RUN_CONFIG_BYTES = 1 << 18


@dataclass(frozen=True)
class Description:
    """checkpoint.json. `config` is the resolved config of the run, `dataset` the manifest's
    fingerprint, `began_at` the `Position` at which the run began: not zero where it is a branch.
    `trained_s`: seconds of the steps that led here. `averaged`: in a mean of checkpoints, their names
    and hashes.
    """

    step: int
    tokens: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    dataset: str
    began_at: dict[str, int] = field(default_factory=dict)
    val_loss: float | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    bad_steps: int = 0
    grad_norms: list[float] = field(default_factory=list)
    trained_s: float = 0.0
    averaged: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    program: str = pipeline.__version__
    format: int = FORMAT_VERSION
    hash: str = ""


@dataclass(frozen=True)
class State:
    """The tensors of a checkpoint in the model's layout: parameters by name, the optimizer's state
    by `kind.name`.

    Each tensor of the optimizer's state has its parameter's shape, or is a scalar.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @classmethod
    def of(cls, model: LanguageModel, optimizer: torch.optim.Optimizer) -> Self:
        """The tensors themselves, not copies: the next optimizer step changes them."""
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        state = {
            f"{kind}.{name}": value
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state[parameter].items()
        }
        return cls(weights, state)

    def hand_in(self) -> None:
        """What the other ranks do while rank 0 copies a sharded state: send their part of each
        tensor, in the same order.
        """
        for tensor in (*self.weights.values(), *self.optimizer.values()):
            gather(tensor, None)


def write_checkpoint(
    checkpoints: Path,
    state: State,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    description: Description,
    best: bool = False,
) -> Path:
    """Write `checkpoints/step_NNNNNNNN` and point `latest`, and with `best` that too, at it.
    Returns the folder.

    `state` is a copy, on the CPU, which is overwritten: its memory takes the folder's layout. Of
    `model` only the shape is used: training may have changed its tensors since.
    """
    final = checkpoints / folder_name(description.step)
    partial = checkpoints / f".{final.name}.partial"
    # A killed save may have left one.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    layout = layout_of(model.config)
    try:
        weights = {layout.stored_name(name): _in_place(model, name, tensor) for name, tensor in state.weights.items()}
        write_model(partial, model, tokenizer, tensors=weights)
        _save_tensors(partial / TRAINING_STATE, _optimizer_in_folder_layout(model, state.optimizer))
        write_description(partial, description)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # or a full disk has no room for status.json either
        raise
    if final.is_dir():  # the run resumed from an earlier step and has come this far again
        replaced = checkpoints / f".{final.name}.replaced.partial"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    publish(partial, final)
    if best:  # before `latest`: a run killed in between resumes from before this step and comes here again
        set_pointer(checkpoints, "best", final)
    set_pointer(checkpoints, "latest", final)
    return final


def write_description(folder: Path, description: Description) -> None:
    """Write checkpoint.json with the hashes of all files in `folder`."""
    hashes = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    # The files reach the disk before the description that vouches for them.
    for name in hashes:
        sync(folder / name)
    document = asdict(description) | {"files": hashes}
    write_atomic(folder / DESCRIPTION, dump_json(document | {"hash": hash_of_description(document)}, indent=2))


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def write_model(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """The files that Hugging Face reads: config, weights (`tensors` as the folder stores them, by
    default the model's) and tokenizer; and the file that our tokenizer reads, where that is another
    one.
    """
    layout, config = layout_of(model.config), model.config
    parameters = tensors or {
        # One by one: no GPU has room for all the copies.
        layout.stored_name(name): to_folder(model, name, parameter.detach()).contiguous().to("cpu", dtype)
        for name, parameter in model.named_parameters()
    }
    # What the folder has and the model has not is zero: a bias of zero is no bias.
    zeros = {
        stored: torch.zeros(shape, dtype=dtype)
        for stored, shape in layout.shapes(config, model.vocab_size).items()
        if not layout.is_trained(config, stored)
    }
    _save_tensors(folder / WEIGHTS, parameters | zeros, metadata={"format": "pt"})
    dtype_name = str(dtype).removeprefix("torch.")
    document = layout.config_json(config, model.vocab_size, tokenizer.end_of_text, dtype_name)
    (folder / CONFIG).write_bytes(dump_json(document, indent=2))
    for name, content in (tokenizer_files(tokenizer, config.block_size) | tokenizer.files()).items():
        (folder / name).write_bytes(content)


# ---- a parameter in the model <-> its tensor in the folder ----


def to_folder(model: LanguageModel, name: str, tensor: Tensor) -> Tensor:
    """A view of a parameter, or of a tensor of its shape such as one of Adam's moments, as the
    folder stores it.
    """
    layout = layout_of(model.config)
    if name in layout.vocabulary_rows:
        return tensor[: model.vocab_size]
    return tensor.t() if name.endswith(layout.transposed) else tensor


def _in_place(model: LanguageModel, name: str, tensor: Tensor) -> Tensor:
    """`to_folder` in the memory of `tensor`, contiguous, as safetensors stores no strides: a second
    copy of all transposed matrices took another 8 bytes a parameter.
    """
    stored = to_folder(model, name, tensor)
    if stored.is_contiguous():
        return stored
    return tensor.view(-1).copy_(stored.reshape(-1)).view(stored.shape)


def from_folder(model: LanguageModel, name: str, stored: Tensor) -> Tensor:
    """The inverse of `to_folder`, padding rows zero. Rows that the folder has beyond the model's
    vocabulary, or beyond its block size, are dropped.
    """
    layout = layout_of(model.config)
    if name in layout.vocabulary_rows:
        return pad(stored[: model.vocab_size], (0, 0, 0, model.padded_vocab_size - model.vocab_size))
    if name in layout.position_rows:
        return stored[: model.config.block_size]
    return stored.t() if name.endswith(layout.transposed) else stored


# ---- files and descriptions ----


def _save_tensors(path: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    """safetensors writes mode 0600; who may read the rest of the folder may read this file too."""
    path.touch()
    mode = path.stat().st_mode
    with as_os_error(path):
        save_file(tensors, path, **options)
    path.chmod(mode)


def read_description(folder: Path) -> Description:
    """checkpoint.json alone: the files it lists are not looked at. Raises UserError where it is
    missing or damaged.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint of this program: it has no {DESCRIPTION}")
    try:
        content = read_limited(path, MOST_DESCRIPTION_BYTES)
        document = parse_json(content)
        if document["format"] != FORMAT_VERSION:
            raise UserError(f"{path} has format {document['format']!r}, this program reads {FORMAT_VERSION}")
        description = Description(**document)
        _check_types(document)
        # Of the document, not the file: whitespace does not matter. Nor of a file that another library
        # wrote, as earlier versions of this program did, which has other numbers: 0.00006 for 6e-05.
        written = hash_bytes(re.sub(rb',\s*"hash": "[0-9a-f]*"(?=\s*}$)', b"", content))
        damaged = document.get("hash") not in (hash_of_description(document), written)
        _upgrade(document["config"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): use another checkpoint") from None
    if damaged:
        raise UserError(f"{path} is damaged (does not match its own hash): use another checkpoint")
    return description


def _upgrade(config: dict[str, Any]) -> None:
    """Bring the config of an earlier version to today's keys: `eval.batches` depended on the memory."""
    if "batches" in config.get("eval", ()):
        windows = config["eval"].pop("batches") * config["train"]["micro_batch_size"]
        config["eval"]["tokens"] = windows * config["model"]["block_size"]


def _check_types(document: dict[str, Any]) -> None:
    """Raises KeyError or TypeError for what this program never writes."""
    check_types(document, get_type_hints(Description))
    check_types(document.get("began_at", {}), get_type_hints(Position))
    check_spec(document["tokenizer"])
    # verify_files opens these: a name must not lead out of the folder.
    files = document.get("files", {})
    if not all(is_plain_name(name) and isinstance(hash_, str) for name, hash_ in files.items()):
        raise TypeError("files names paths outside the folder")
    for name, numbers in (
        ("grad_norms", document.get("grad_norms", ())),
        ("scaler", document.get("scaler", {}).values()),
    ):
        if not all(isinstance(number, float | int | None) for number in numbers):
            raise TypeError(f"{name} holds something else than numbers")
    if len(dump_json(document["config"], indent=2)) > MOST_RUN_CONFIG_BYTES:
        raise TypeError("config is too large")


def verify_files(folder: Path, description: Description, without: Collection[str] = ()) -> None:
    """Compare a checkpoint's files, except those in `without`, with their hashes. Raises UserError
    for a difference.
    """
    for name, recorded in description.files.items():
        file = folder / name
        if name in without:
            continue
        if not file.is_file():
            raise UserError(f"checkpoint {folder} is damaged: {name} is missing; use another checkpoint")
        if hash_file(file) != recorded:
            raise UserError(f"checkpoint {folder} is damaged: {name} does not match its hash; use another checkpoint")


def _optimizer_in_folder_layout(model: LanguageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a parameter's shape in the layout of the weights; scalars, such as a step, as they
    are.
    """
    layout, stored = layout_of(model.config), {}
    for key, tensor in state.items():
        kind, _, name = key.partition(".")
        stored[f"{kind}.{layout.stored_name(name)}"] = _in_place(model, name, tensor) if tensor.ndim else tensor
    return stored


def hash_of_description(document: dict[str, Any]) -> str:
    """The hash of a description, its own hash left out."""
    return hash_bytes(dump_json({name: value for name, value in document.items() if name != "hash"}, indent=2))
