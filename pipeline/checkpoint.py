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
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import pipeline
from pipeline import huggingface
from pipeline.config import CHECKPOINT_NAME, ModelConfig, from_dict
from pipeline.errors import UserError
from pipeline.files import hash_bytes, hash_file, publish, sync, write_atomic
from pipeline.log import logger
from pipeline.model import GPT
from pipeline.sharding import part_for, whole
from pipeline.tokenizer import BytePairTokenizer, Tokenizer, from_spec

FORMAT_VERSION = 1
DESCRIPTION = "checkpoint.json"
WEIGHTS = "model.safetensors"
TRAINING_STATE = "training_state.safetensors"
GPT2_VOCAB_SIZE = 50257


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


def save(
    checkpoints: Path, model: GPT, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, description: Description
) -> Path:
    """`write` of the state as it is now."""
    return write(checkpoints, State.of(model, optimizer), model, tokenizer, description)


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
    save_file(_optimizer_in_folder_layout(model, state.optimizer), partial / TRAINING_STATE)
    hashes = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
    for name in hashes:
        sync(partial / name)
    document = asdict(description) | {"files": hashes}
    write_atomic(partial / DESCRIPTION, _dump(document | {"hash": _hash_of(document)}))
    if final.is_dir():  # the run went back to an earlier step, and has come this far again
        replaced = checkpoints / f".{final.name}.replaced.partial"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    publish(partial, final)
    if best:  # before `latest`: killed in between, the run comes here again
        point(checkpoints, "best", final)
    point(checkpoints, "latest", final)
    return final


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def write_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """The files that Hugging Face reads: config, weights and tokenizer; and the tokenizer's own, where it has one."""
    _write_model(folder, model, dict(model.named_parameters()), tokenizer)


def _write_model(folder: Path, model: GPT, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    parameters = {
        name: huggingface.to_folder_layout(model, name, tensor).cpu()  # one by one: no GPU holds all the copies
        for name, tensor in weights.items()
    }
    save_file(parameters | huggingface.zero_biases(model), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_bytes(_dump(huggingface.config_json(model, tokenizer.end_of_text)))
    for name, content in (huggingface.tokenizer_files(tokenizer) | tokenizer.files()).items():
        (folder / name).write_bytes(content)


def point(checkpoints: Path, pointer: str, folder: Path) -> None:
    """Make `latest` or `best` name `folder`."""
    write_atomic(checkpoints / pointer, f"{folder.name}\n".encode())


def pointed_at(checkpoints: Path, pointer: str) -> Path | None:
    """The folder whose name `latest` or `best` holds, there or not; None where there is no such pointer."""
    path = checkpoints / pointer
    if not path.is_file():
        return None
    name = path.read_bytes().decode(errors="replace").strip()
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
    if pointer.is_file() and pointer.read_text(encoding="utf-8").strip() == folder.name:
        pointer.unlink()
    return aside


def resolve(ckpt: str, run_dir: Path | None, runs: Path) -> Path:
    """The folder a `--ckpt` means: a path, or `latest`/`best` of `run_dir`, by default of the newest run under `runs`."""
    if ckpt not in ("latest", "best"):
        path = Path(ckpt)
        if not path.is_dir():
            raise UserError(f"no checkpoint at {path}: wanted a checkpoint folder, latest or best")
        return path
    if run_dir is None:
        pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
        if not pointers:
            raise UserError(f"no checkpoint under {runs}/: train first, or name a folder with --ckpt PATH")
        run_dir = pointers[-1].parents[1]
    folder = named(run_dir / "checkpoints", ckpt)
    if folder is None:
        raise UserError(f"{run_dir} has no checkpoint {ckpt}: train first, or name a folder with --ckpt PATH")
    return folder


def read_description(folder: Path) -> Description:
    """checkpoint.json, without a look at the files it speaks of. Raises UserError for one that is missing or damaged."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint of this program: it has no {DESCRIPTION}")
    try:
        document = orjson.loads(path.read_bytes())
        if document["format"] != FORMAT_VERSION:
            raise UserError(f"{path} has format {document['format']}, this program reads {FORMAT_VERSION}")
        description = Description(**document)
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): use another checkpoint") from None
    if description.hash and description.hash != _hash_of(document):  # the first checkpoints of format 1 had none
        raise UserError(f"{path} is damaged (it does not match its own hash): use another checkpoint")
    return description


def verify(folder: Path, description: Description, without: Collection[str] = ()) -> None:
    """Check a checkpoint's files, but for those `without`, against their hashes. Raises UserError for the first that differs."""
    for name, recorded in description.files.items():
        file = folder / Path(name).name
        if name in without:
            continue
        if not file.is_file():
            raise UserError(f"checkpoint {folder} is damaged: {name} is missing; use another checkpoint")
        if hash_file(file) != recorded:
            raise UserError(f"checkpoint {folder} is damaged: {name} does not match its hash; use another checkpoint")


def identify(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The shape and the vocabulary of our checkpoint or of a Hugging Face GPT-2 folder, its weights verified if ours."""
    if (folder / DESCRIPTION).is_file():
        description = read_description(folder)
        verify(folder, description, without=(TRAINING_STATE,))
        return from_dict(description.config).model, from_spec(description.tokenizer, folder)
    config, vocab_size = _foreign_config(folder)
    return config, _foreign_tokenizer(folder, vocab_size)


def load_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model, in float32 on the CPU, and its tokenizer, from our checkpoint or any Hugging Face GPT-2 folder."""
    config, tokenizer = identify(folder)
    model = _uninitialised(config, tokenizer.vocab_size)
    load_weights(model, folder)
    return model, tokenizer


def load_initial_weights(model: GPT, tokenizer_spec: dict[str, Any], folder: Path) -> None:
    """Start a new run from a folder's weights. Raises UserError unless they mean the same in `model` as where they are from."""
    config, tokenizer = identify(folder)
    if tokenizer.spec() != tokenizer_spec:
        raise UserError(
            f"{folder} has the vocabulary {tokenizer.name} of {tokenizer.vocab_size} tokens, the dataset has another one "
            f"({tokenizer_spec['name']}, {tokenizer_spec['vocab_size']}): prepare the data with the same tokenizer"
        )
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "tie_weights"):
        theirs, ours = getattr(config, key), getattr(model.config, key)
        if theirs != ours:
            raise UserError(
                f"{folder} has {key}={theirs}, the config says {ours}: set model.{key}={str(theirs).lower()}"
            )
    load_weights(model, folder)


def load_weights(model: GPT, folder: Path) -> None:
    """Fill `model` from a folder's model.safetensors. Raises UserError unless names and shapes fit, before any is read."""
    own = dict(model.named_parameters())

    def restore(name: str, tensor: Tensor) -> None:
        own[name].copy_(part_for(own[name], huggingface.from_folder_layout(model, name, tensor)))

    _fill(folder / WEIGHTS, huggingface.folder_shapes(model), restore, ignored=set(huggingface.zero_biases(model)))


def load_optimizer(optimizer: torch.optim.Optimizer, model: GPT, folder: Path) -> None:
    """Fill the optimizer's state from a folder's training_state.safetensors, which is empty before the first good step."""
    if not _has_tensors(folder / TRAINING_STATE):
        return
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    shapes = huggingface.folder_shapes(model)
    wanted = {f"{kind}.{name}": shape for name, shape in shapes.items() for kind in ("exp_avg", "exp_avg_sq")}
    wanted |= {f"step.{name}": () for name in shapes}

    def restore(key: str, tensor: Tensor) -> None:
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        if kind == "step":
            state[name][kind] = tensor.to(parameter.device)
        else:  # with the parameter's own strides, as the optimizer would have made it
            part = part_for(parameter, huggingface.from_folder_layout(model, name, tensor))
            state[name][kind] = torch.empty_like(parameter).copy_(part)

    _fill(folder / TRAINING_STATE, wanted, restore)
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


def _fill(
    path: Path,
    wanted: dict[str, tuple[int, ...]],
    take: Callable[[str, Tensor], object],
    ignored: Collection[str] = (),
) -> None:
    """Hand every tensor of a safetensors file to `take`, after names and shapes in its header were checked."""
    if path.with_name(f"{path.name}.index.json").is_file():
        raise UserError(f"{path.parent} holds its weights in several files: save it again as one, {path.name}")
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}: only safetensors are read, pickled weights (.bin, .pt) never"
        )
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            found = {_full_name(name): name for name in file.keys()}  # noqa: SIM118 - no mapping, it has keys() only
            shapes = {full: tuple(file.get_slice(name).get_shape()) for full, name in found.items()}
            _check_names(path, wanted, {name: shape for name, shape in shapes.items() if name not in ignored})
            for name in wanted:
                take(name, file.get_tensor(found[name]))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def _has_tensors(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return bool(list(file.keys()))


def _full_name(name: str) -> str:
    """OpenAI's own GPT-2 files leave the leading "transformer." out."""
    return f"transformer.{name}" if re.match(r"(wte|wpe|h\.\d+|ln_f)\.", name) else name


def _check_names(path: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    # Old files carry the causal mask, and a tied head, as tensors of their own.
    known = {name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))}
    if "lm_head.weight" not in wanted:
        known.add("lm_head.weight")
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys() - known)
    differing = [
        f"{name} is {found[name]}, wanted {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    faults = [
        f"{title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for title, names in (("missing", missing), ("unknown", unknown), ("of another shape", differing))
        if names
    ]
    if faults:
        raise UserError(f"{path} does not fit the model: {'; '.join(faults)}")


def _foreign_config(folder: Path) -> tuple[ModelConfig, int]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no checkpoint: it has neither {DESCRIPTION} nor a Hugging Face config.json")
    try:
        document = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object: it does not describe a GPT-2 model")
    return huggingface.model_config(document, str(folder))


def _foreign_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    if vocab_size != GPT2_VOCAB_SIZE:
        raise UserError(
            f"{folder} has {vocab_size} tokens and no {DESCRIPTION}: its vocabulary is unknown; "
            f"a foreign folder is taken for GPT-2's vocabulary at {GPT2_VOCAB_SIZE} tokens only"
        )
    return BytePairTokenizer("gpt2")


def _uninitialised(config: ModelConfig, vocab_size: int) -> GPT:
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
