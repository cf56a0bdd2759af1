"""A checkpoint: a folder that exists only when whole, and that is a Hugging Face model folder as it stands.

    runs/<name>/checkpoints/step_00001000/
        config.json model.safetensors tokenizer.json ...      what Hugging Face reads
        [vocabulary.*]                                        what our tokenizer reads, where it is none of those
        training_state.safetensors                            the optimizer's state
        checkpoint.json                                       written last: the description below, every file's hash, its own
    runs/<name>/checkpoints/latest, best                      one line each: a folder's name

There is no random state to save: the order of the data and every dropout mask follow from the seed and the step. There is
no pickle anywhere, so loading a checkpoint executes nothing.
"""

import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson
import torch
from safetensors.torch import save_file
from torch import Tensor

import pipeline
from pipeline.checkpoint import layout_gpt2 as huggingface
from pipeline.checkpoint.pointers import best_folder, checkpoint_folders, pointed_folder, set_pointer, step_of
from pipeline.checkpoint.safetensors_files import WEIGHTS
from pipeline.errors import UserError
from pipeline.files import hash_bytes, hash_file, publish, read_limited, sync, write_atomic
from pipeline.log import logger
from pipeline.model.language_model import GPT
from pipeline.model.sharding import whole
from pipeline.vocabulary.huggingface_files import tokenizer_files
from pipeline.vocabulary.tokenizer import Tokenizer

FORMAT_VERSION = 1
DESCRIPTION = "checkpoint.json"
TRAINING_STATE = "training_state.safetensors"
MOST_DESCRIPTION_BYTES = 1 << 23  # a `char` vocabulary of every character there is takes five megabytes
MOST_RUN_CONFIG_BYTES = 1 << 18
# Of a file that a stranger may have written: what else it holds is no description.
_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,), "tokens": (int,), "config": (dict,), "tokenizer": (dict,), "dataset": (str,),
    "val_loss": (float, int, type(None)), "scaler": (dict,), "bad_steps": (int,), "grad_norms": (list,),
    "files": (dict,), "program": (str,), "format": (int,), "hash": (str,),
}  # fmt: skip
_SPEC_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "vocab_size": (int,), "end_of_text": (int,), "fingerprint": (str,),
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """checkpoint.json. `config` is the resolved config of the run, `dataset` the manifest's fingerprint."""

    step: int
    tokens: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    dataset: str
    val_loss: float | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    bad_steps: int = 0
    grad_norms: list[float] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    program: str = pipeline.__version__
    format: int = FORMAT_VERSION
    hash: str = ""


@dataclass(frozen=True)
class State:
    """The tensors of a checkpoint in the model's own layout: parameters by name, the optimizer's by `kind.name`."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @classmethod
    def of(cls, model: GPT, optimizer: torch.optim.Optimizer) -> Self:
        """The tensors themselves: the next optimizer step changes them."""
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        moments = {
            f"{kind}.{name}": value
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state[parameter].items()
        }
        return cls(weights, moments)

    def hand_in(self) -> None:
        """What the other ranks do while rank 0 copies a sharded state: their part of each tensor goes there, in its order."""
        for tensor in (*self.weights.values(), *self.optimizer.values()):
            whole(tensor)


def write_checkpoint(
    checkpoints: Path, state: State, model: GPT, tokenizer: Tokenizer, description: Description, best: bool = False
) -> Path:
    """Write `checkpoints/step_NNNNNNNN` and point `latest`, and `best` if it is that, at it. Returns the folder.

    Of `model` only the shape is used: its own tensors may have moved on from `state`.
    """
    final = checkpoints / folder_name(description.step)
    partial = checkpoints / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_model(partial, model, state.weights, tokenizer)
    _save_tensors(partial / TRAINING_STATE, _optimizer_in_folder_layout(model, state.optimizer))
    write_description(partial, description)
    if final.is_dir():  # the run went back to an earlier step, and has come this far again
        replaced = checkpoints / f".{final.name}.replaced.partial"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    publish(partial, final)
    if best:  # before `latest`: killed in between, the run comes here again
        set_pointer(checkpoints, "best", final)
    set_pointer(checkpoints, "latest", final)
    return final


def write_description(folder: Path, description: Description) -> None:
    """Write checkpoint.json over the files that are in `folder`."""
    hashes = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    for name in hashes:
        sync(folder / name)
    document = asdict(description) | {"files": hashes}
    write_atomic(folder / DESCRIPTION, dump_json(document | {"hash": hash_of_description(document)}))


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def write_model(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """The files that Hugging Face reads: config, weights and tokenizer; and the tokenizer's own, where it has one."""
    _write_model(folder, model, dict(model.named_parameters()), tokenizer, dtype)


def _write_model(
    folder: Path, model: GPT, tensors: dict[str, Tensor], tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> None:
    parameters = {
        # One by one: no GPU holds all the copies.
        name: huggingface.to_folder_layout(model, name, tensor).to("cpu", dtype)
        for name, tensor in tensors.items()
    }
    zeros = {
        name: torch.zeros(shape, dtype=dtype)
        for name, shape in huggingface.folder_shapes(model.config, model.vocab_size).items()
        if not huggingface.is_trained(model.config, name)
    }
    _save_tensors(folder / WEIGHTS, parameters | zeros, metadata={"format": "pt"})
    named = str(dtype).removeprefix("torch.")
    config = huggingface.config_json(model.config, model.vocab_size, tokenizer.end_of_text, named)
    (folder / huggingface.CONFIG).write_bytes(dump_json(config))
    for name, content in (tokenizer_files(tokenizer) | tokenizer.files()).items():
        (folder / name).write_bytes(content)


def _save_tensors(path: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    """safetensors gives its file to its owner alone; whoever may read the rest of the folder may read this."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, **options)
    path.chmod(mode)


def best_val_loss(checkpoints: Path) -> float:
    """The loss to beat: that of `best`, infinity where there is none."""
    folder = best_folder(checkpoints)
    try:
        val_loss = None if folder is None else read_description(folder).val_loss
    except UserError as error:
        logger.warning("%s; `best` is chosen anew", error)
        val_loss = None
    return float("inf") if val_loss is None else val_loss


def read_description(folder: Path) -> Description:
    """checkpoint.json, without a look at the files it speaks of. Raises UserError for one that is missing or damaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint of this program: it has no {DESCRIPTION}")
    try:
        document = orjson.loads(read_limited(path, MOST_DESCRIPTION_BYTES))
        if document["format"] != FORMAT_VERSION:
            raise UserError(f"{path} has format {document['format']}, this program reads {FORMAT_VERSION}")
        description = Description(**document)
        _check_types(document)
        own_hash = hash_of_description(document)
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): use another checkpoint") from None
    if description.hash and description.hash != own_hash:  # the first checkpoints of format 1 had none
        raise UserError(f"{path} is damaged (it does not match its own hash): use another checkpoint")
    return description


def _check_types(document: dict[str, Any]) -> None:
    """Raises TypeError for what `write` never wrote."""
    spec, files = document["tokenizer"], document.get("files", {})
    for name, value in (*document.items(), *((name, spec[name]) for name in _SPEC_TYPES)):
        if type(value) not in (_TYPES | _SPEC_TYPES)[name]:
            raise TypeError(f"{name} is of the type {type(value).__name__}")
    if not all(Path(name).name == name not in ("", "..") and isinstance(hash_, str) for name, hash_ in files.items()):
        raise TypeError("files names more than the files beside it")
    if not all(isinstance(norm, float | int | None) for norm in document.get("grad_norms", ())):
        raise TypeError("grad_norms holds more than numbers")
    if len(dump_json(document["config"])) > MOST_RUN_CONFIG_BYTES:
        raise TypeError("config is larger than any")


def verify_files(folder: Path, description: Description, without: Collection[str] = ()) -> None:
    """Check a checkpoint's files, but for those `without`, against their hashes. Raises UserError for the first that differs."""
    for name, recorded in description.files.items():
        file = folder / name
        if name in without:
            continue
        if not file.is_file():
            raise UserError(f"checkpoint {folder} is damaged: {name} is missing; use another checkpoint")
        if hash_file(file) != recorded:
            raise UserError(f"checkpoint {folder} is damaged: {name} does not match its hash; use another checkpoint")


def prune_checkpoints(checkpoints: Path, keep: int, every_steps: int = 1) -> None:
    """Remove all but the `keep` newest checkpoints, `latest` and `best`: only folders of ours, and partial ones.

    Of those made at multiples of `every_steps` the newest stays too, for a run that has to go back.
    """
    ours = [folder for folder in checkpoint_folders(checkpoints) if (folder / DESCRIPTION).is_file()]
    planned = [folder for folder in ours if step_of(folder) % every_steps == 0]
    kept = {*ours[-keep:], *planned[-1:], pointed_folder(checkpoints, "latest"), best_folder(checkpoints)}
    for folder in (*(folder for folder in ours if folder not in kept), *checkpoints.glob(".step_*.partial")):
        shutil.rmtree(folder)


def _optimizer_in_folder_layout(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments in the layout of the weights; what has no dimensions, such as a step, as it is."""
    stored = {}
    for key, tensor in tensors.items():
        name = key.partition(".")[2]
        stored[key] = (huggingface.to_folder_layout(model, name, tensor) if tensor.ndim else tensor).cpu()
    return stored


def dump_json(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


def hash_of_description(document: dict[str, Any]) -> str:
    """The hash of a description, its own hash left out."""
    return hash_bytes(dump_json({name: value for name, value in document.items() if name != "hash"}))
