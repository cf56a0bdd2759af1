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

import itertools
import math
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
from pipeline import hub, huggingface, weights
from pipeline.config import CHECKPOINT_NAME, ModelConfig, RunConfig, from_dict
from pipeline.device import memory
from pipeline.errors import UserError
from pipeline.files import hash_bytes, hash_file, publish, read_limited, sync, write_atomic
from pipeline.huggingface import ModelFolder
from pipeline.log import logger
from pipeline.model import GPT
from pipeline.sharding import part_for, whole
from pipeline.tokenizer import Tokenizer, from_spec
from pipeline.tokenizer_files import fingerprints, tokenizer_files
from pipeline.weights import WEIGHTS

FORMAT_VERSION = 1
DESCRIPTION = "checkpoint.json"
RUNS = Path(RunConfig.dir)  # where `latest` and `best` are looked up
TRAINING_STATE = "training_state.safetensors"
MOST_POINTER_BYTES = 200
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


def write(
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
    describe(partial, description)
    if final.is_dir():  # the run went back to an earlier step, and has come this far again
        replaced = checkpoints / f".{final.name}.replaced.partial"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    publish(partial, final)
    if best:  # before `latest`: killed in between, the run comes here again
        point(checkpoints, "best", final)
    point(checkpoints, "latest", final)
    return final


def describe(folder: Path, description: Description) -> None:
    """Write checkpoint.json over the files that are in `folder`."""
    hashes = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    for name in hashes:
        sync(folder / name)
    document = asdict(description) | {"files": hashes}
    write_atomic(folder / DESCRIPTION, _dump(document | {"hash": _hash_of(document)}))


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
    (folder / huggingface.CONFIG).write_bytes(_dump(config))
    for name, content in (tokenizer_files(tokenizer) | tokenizer.files()).items():
        (folder / name).write_bytes(content)


def _save_tensors(path: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    """safetensors gives its file to its owner alone; whoever may read the rest of the folder may read this."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, **options)
    path.chmod(mode)


def point(checkpoints: Path, pointer: str, folder: Path) -> None:
    """Make `latest` or `best` name `folder`."""
    write_atomic(checkpoints / pointer, f"{folder.name}\n".encode())


def pointed_at(checkpoints: Path, pointer: str) -> Path | None:
    """The folder whose name `latest` or `best` holds, there or not; None where there is no such pointer."""
    path = checkpoints / pointer
    if not path.is_file():
        return None
    name = read_limited(path, MOST_POINTER_BYTES).decode(errors="replace").strip()
    if not CHECKPOINT_NAME.fullmatch(name):
        raise UserError(
            f"{path} holds {name!r}, wanted a folder's name such as step_00001000: write one of those beside it"
        )
    return checkpoints / name


def named(checkpoints: Path, pointer: str) -> Path | None:
    """The folder that `latest` or `best` names; None where there is no such pointer. Raises UserError for a bad one."""
    folder = pointed_at(checkpoints, pointer)
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"{checkpoints / pointer} names {folder.name}, which is not there: write the name of a folder beside it into the file"
        )
    return folder


def best(checkpoints: Path) -> Path | None:
    """The folder that `best` names, None with a warning where it is gone: no reason to end a healthy run."""
    try:
        return named(checkpoints, "best")
    except UserError as error:
        logger.warning("%s; taken for absent", error)
        return None


def best_val_loss(checkpoints: Path) -> float:
    """The loss to beat: that of `best`, infinity where there is none."""
    folder = best(checkpoints)
    try:
        val_loss = None if folder is None else read_description(folder).val_loss
    except UserError as error:
        logger.warning("%s; `best` is chosen anew", error)
        val_loss = None
    return float("inf") if val_loss is None else val_loss


def folders(checkpoints: Path) -> list[Path]:
    """What bears a checkpoint's name, whole or not, from the first step to the last."""
    return sorted((path for path in checkpoints.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def set_aside_after(checkpoints: Path, step: int) -> None:
    """A run that goes on from `step` leaves later checkpoints behind: they keep their content under another name."""
    for folder in folders(checkpoints):
        if step_of(folder) > step:
            aside = set_aside(folder, "left_behind")
            logger.warning("%s is past step %d, where this run goes on: now %s", folder, step, aside.name)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint to `why` and its old name, which nothing looks for; `best` no longer names it."""
    names = (f"{why}_{folder.name}{suffix}" for suffix in itertools.chain([""], (f"_{n}" for n in itertools.count(2))))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    folder.rename(aside)
    pointer = folder.parent / "best"
    if pointer.is_file() and pointer.read_bytes().strip() == folder.name.encode():
        pointer.unlink()
    return aside


def resolve(ckpt: str, run_dir: Path | None, runs: Path = RUNS) -> Path:
    """The folder a `--ckpt` means: a path, hf:ORG/NAME, or `latest`/`best` of `run_dir`, by default of the newest run
    under `runs`.
    """
    if ckpt not in ("latest", "best"):
        return model_folder(ckpt)
    if run_dir is None:
        pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
        if not pointers:
            raise UserError(f"no checkpoint under {runs}/: train first, or name a folder with --ckpt PATH")
        run_dir = pointers[-1].parents[1]
    folder = named(run_dir / "checkpoints", ckpt)
    if folder is None:
        raise UserError(f"{run_dir} has no checkpoint {ckpt}: train first, or name a folder with --ckpt PATH")
    return folder


def model_folder(name: str) -> Path:
    """The folder that hf:ORG/NAME[@REVISION] or a path names. Raises UserError where there is none."""
    if name.startswith("hf:"):
        return hub.model_folder(name)
    if not Path(name).is_dir():
        raise UserError(f"no checkpoint at {name}: wanted a checkpoint folder, hf:ORG/NAME, latest or best")
    return Path(name)


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
        own_hash = _hash_of(document)
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
    if len(_dump(document["config"])) > MOST_RUN_CONFIG_BYTES:
        raise TypeError("config is larger than any")


def verify(folder: Path, description: Description, without: Collection[str] = ()) -> None:
    """Check a checkpoint's files, but for those `without`, against their hashes. Raises UserError for the first that differs."""
    for name, recorded in description.files.items():
        file = folder / name
        if name in without:
            continue
        if not file.is_file():
            raise UserError(f"checkpoint {folder} is damaged: {name} is missing; use another checkpoint")
        if hash_file(file) != recorded:
            raise UserError(f"checkpoint {folder} is damaged: {name} does not match its hash; use another checkpoint")


def identify(folder: Path, verified: bool = True) -> ModelFolder:
    """The model in our checkpoint, its hashes verified, or in a Hugging Face GPT-2 folder: its weights have that shape."""
    if (folder / DESCRIPTION).is_file():
        description = read_description(folder)
        config, spec = from_dict(description.config).model, description.tokenizer
        if verified:
            verify(folder, description, without=(TRAINING_STATE,))
        found = ModelFolder(config, from_spec(spec, folder), spec["vocab_size"])
    elif (folder / huggingface.CONFIG).is_file():
        found = huggingface.identify(folder)
    else:
        raise UserError(
            f"{folder} is no checkpoint: it has neither {DESCRIPTION} nor a Hugging Face {huggingface.CONFIG}"
        )
    with weights.opened(weights.weight_files(folder)) as stored:
        if found.config.n_layer > len(stored):
            raise UserError(f"{folder} does not fit the model: {found.config.n_layer} layers of {len(stored)} tensors")
        weights.check(folder, huggingface.folder_shapes(found.config, found.vocab_rows), stored)
    return found


def load_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model, in float32 on the CPU, and its tokenizer, from our checkpoint or any Hugging Face GPT-2 folder."""
    found = identify(folder)
    _check_memory(folder, found.config, found.tokenizer.vocab_size)
    model = uninitialised(found.config, found.tokenizer.vocab_size)
    load_weights(model, folder, found)
    return model, found.tokenizer


def load_initial_weights(model: GPT, tokenizer_spec: dict[str, Any], folder: Path) -> None:
    """Start a new run from a folder's weights; of its positions the first `block_size` are taken. Raises UserError unless
    they mean the same in `model` as where they are from.
    """
    found = identify(folder)
    if tokenizer_spec["fingerprint"] not in fingerprints(folder, found.tokenizer):
        name = found.tokenizer.name if found.tokenizer.name in ("gpt2", "byte") else folder
        raise UserError(
            f"{folder} has the vocabulary {found.tokenizer.name} of {found.tokenizer.vocab_size} tokens, of which "
            f"{found.tokenizer.end_of_text} ends a text, the dataset has another one ({tokenizer_spec['name']}, "
            f"{tokenizer_spec['vocab_size']}, {tokenizer_spec['end_of_text']}): prepare the data with --tokenizer {name}"
        )
    theirs, ours = asdict(found.config), asdict(model.config)
    differing = [key for key in ("n_layer", "n_head", "n_embd", "bias", "tie_weights") if theirs[key] != ours[key]]
    if model.config.block_size > found.config.block_size:
        differing.append("block_size")
    if differing:
        have = ", ".join(
            f"{key}={str(theirs[key]).lower()} (the config: {str(ours[key]).lower()})" for key in differing
        )
        paste = " ".join(f"model.{key}={str(theirs[key]).lower()}" for key in differing)
        raise UserError(f"{folder} has {have}: add {paste}{'; or a smaller block_size' * ('block_size' in differing)}")
    load_weights(model, folder, found)


def load_weights(model: GPT, folder: Path, source: ModelFolder | None = None) -> None:
    """Fill `model` from a folder's weights, by default of its own shape. Raises UserError unless names, shapes and types
    fit, before any is read.
    """
    own = dict(model.named_parameters())
    config, rows = (source.config, source.vocab_rows) if source else (model.config, model.vocab_size)

    def restore(name: str, tensor: Tensor) -> None:
        if name in own:
            own[name].copy_(part_for(own[name], huggingface.from_folder_layout(model, name, tensor)))

    weights.fill(folder, weights.weight_files(folder), huggingface.folder_shapes(config, rows), restore)


def load_optimizer(optimizer: torch.optim.Optimizer, model: GPT, folder: Path) -> None:
    """Fill the optimizer's state from a folder's training_state.safetensors, which is empty before the first good step."""
    path = folder / TRAINING_STATE
    with weights.opened([path]) as stored:
        if not stored:
            return
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    shapes = huggingface.folder_shapes(model.config, model.vocab_size)
    wanted = {f"{kind}.{name}": shapes[name] for name in parameters for kind in ("exp_avg", "exp_avg_sq")}
    wanted |= {f"step.{name}": () for name in parameters}

    def restore(key: str, tensor: Tensor) -> None:
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        if kind == "step":
            state[name][kind] = tensor.to(parameter.device)
        else:  # with the parameter's own strides, as the optimizer would have made it
            part = part_for(parameter, huggingface.from_folder_layout(model, name, tensor))
            state[name][kind] = torch.empty_like(parameter).copy_(part)

    weights.fill(path, [path], wanted, restore)
    for name, parameter in parameters.items():
        optimizer.state[parameter] = state[name]


def prune(checkpoints: Path, keep: int, every_steps: int = 1) -> None:
    """Remove all but the `keep` newest checkpoints, `latest` and `best`: only folders of ours, and partial ones.

    Of those made at multiples of `every_steps` the newest stays too, for a run that has to go back.
    """
    ours = [folder for folder in folders(checkpoints) if (folder / DESCRIPTION).is_file()]
    planned = [folder for folder in ours if step_of(folder) % every_steps == 0]
    kept = {*ours[-keep:], *planned[-1:], named(checkpoints, "latest"), best(checkpoints)}
    for folder in (*(folder for folder in ours if folder not in kept), *checkpoints.glob(".step_*.partial")):
        shutil.rmtree(folder)


def _optimizer_in_folder_layout(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments in the layout of the weights; what has no dimensions, such as a step, as it is."""
    stored = {}
    for key, tensor in tensors.items():
        name = key.partition(".")[2]
        stored[key] = (huggingface.to_folder_layout(model, name, tensor) if tensor.ndim else tensor).cpu()
    return stored


def _check_memory(folder: Path, config: ModelConfig, vocab_size: int) -> None:
    """Raises UserError for a model that this machine cannot hold: a file of any size takes no room where it has holes."""
    needed = 4 * sum(map(math.prod, huggingface.folder_shapes(config, vocab_size).values()))
    there = memory(torch.device("cpu"))
    if needed > there:
        raise UserError(
            f"{folder} wants {needed / 1e9:,.0f} GB of memory for its weights, this machine has {there / 1e9:,.0f} GB: "
            "is its config what it should be?"
        )


def uninitialised(config: ModelConfig, vocab_size: int) -> GPT:
    """A model whose weights are about to be read: drawing random ones first would take seconds at 1558M."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    model.to_empty(device="cpu")
    model.tie_and_mask()
    return model


def _dump(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


def _hash_of(document: dict[str, Any]) -> str:
    """The hash of a description, its own hash left out."""
    return hash_bytes(_dump({name: value for name, value in document.items() if name != "hash"}))
