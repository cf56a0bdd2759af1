"""From a model folder to a model with its weights, and an optimizer with its state."""

import math
from collections.abc import MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.checkpoint.folder import TRAINING_STATE, from_folder
from pipeline.checkpoint.layouts import layout_of
from pipeline.checkpoint.open import OpenModel, open_model, open_weights
from pipeline.checkpoint.safetensors_files import Stored, check_tensors, open_tensors
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.machine.device import check_memory
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import scatter
from pipeline.vocabulary.huggingface_files import fingerprints
from pipeline.vocabulary.specs import check_same_vocabulary
from pipeline.vocabulary.tokenizer import Tokenizer

# What may differ between the model that weights come from and the one they go to; block_size may be
# smaller.
FREE_KEYS = ("block_size", "dropout", "activation_checkpointing", "residual_dtype", "init_from")


class Restorable(Protocol):
    """An optimizer that says what its state is called. torch fills `state`, by parameter, at the
    first step.
    """

    @property
    def state(self) -> MutableMapping[Tensor, Any]: ...

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state before its first step: tensors of its shape, or scalars."""


def load_model(folder: Path) -> tuple[LanguageModel, Tokenizer]:
    """The model, in float32 on the CPU, and its tokenizer, from our checkpoint or a Hugging Face
    folder.
    """
    opened = open_model(folder)
    return read_model(opened), opened.tokenizer


def read_model(opened: OpenModel) -> LanguageModel:
    """The model in float32 on the CPU. Raises UserError where the machine has no memory for it."""
    vocab_size = opened.tokenizer.vocab_size
    # A sparse file of any size takes no room on a disk.
    needed = 4 * sum(map(math.prod, layout_of(opened.config).shapes(opened.config, vocab_size).values()))
    check_memory(torch.device("cpu"), needed, f"the weights of {opened.folder}", "check the sizes in its config")
    model = LanguageModel.uninitialised(opened.config, vocab_size)
    _read_weights(model, opened.tensors)
    return model


def load_initial_weights(model: LanguageModel, tokenizer_spec: dict[str, Any], folder: Path) -> None:
    """Start a new run from a folder's weights, of whose positions the first `block_size` are used.
    Raises UserError unless they mean the same in `model` as in the folder.
    """
    opened = open_model(folder)
    # The same shape with another vocabulary would train, and every id would mean another token.
    check_same_vocabulary(
        "the dataset", tokenizer_spec, of=folder, expected=opened.tokenizer.spec(),
        fingerprints=fingerprints(folder, opened.tokenizer),
    )  # fmt: skip
    _check_same_model(folder, opened.config, model.config)
    _read_weights(model, opened.tensors)


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Fill `model` from a folder of its shape. Raises UserError unless names, shapes and types fit,
    before any is read.
    """
    _read_weights(model, open_weights(folder, model.config, model.vocab_size))


def open_optimizer(optimizer: Restorable, model: LanguageModel, folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's training_state.safetensors, none before the first good step. Raises
    UserError unless they are those of this optimizer.
    """
    path = folder / TRAINING_STATE
    tensors = open_tensors([path])
    layout = layout_of(model.config)
    shapes = layout.shapes(model.config, model.vocab_size)
    expected = {
        f"{kind}.{layout.stored_name(name)}": shapes[layout.stored_name(name)] if value.ndim else ()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.initial_state(parameter).items()
    }
    if tensors:
        check_tensors(path, expected, tensors)
    return tensors


def read_optimizer(optimizer: Restorable, model: LanguageModel, tensors: dict[str, Stored] | None) -> None:
    """Fill the optimizer's state on every rank from what rank 0 opened; the others pass None. All
    ranks call it. One tensor at a time is complete, on rank 0.
    """
    layout = layout_of(model.config)
    for name, parameter in model.named_parameters():
        # The optimizer's own tensors, so that strides, types and sharding are those of its steps.
        state = optimizer.initial_state(parameter)
        for kind, value in state.items():
            stored = None if tensors is None else tensors[f"{kind}.{layout.stored_name(name)}"].read()
            scatter(value, from_folder(model, name, stored) if stored is not None and value.ndim else stored)
        optimizer.state[parameter] = state


@torch.no_grad()
def _read_weights(model: LanguageModel, tensors: dict[str, Stored]) -> None:
    layout = layout_of(model.config)
    for name, parameter in model.named_parameters():
        parameter.copy_(from_folder(model, name, tensors[layout.stored_name(name)].read()))


def _check_same_model(folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises UserError with what to paste where a config does not describe a folder's model."""
    there, here = (asdict(layout_of(config).explicit(config)) for config in (theirs, ours))
    differing = [key for key in here if key not in FREE_KEYS and there[key] != here[key]]
    if ours.block_size > theirs.block_size:
        differing.append("block_size")
    if differing:
        values = {key: (str(there[key]).lower(), str(here[key]).lower()) for key in differing}
        found = ", ".join(f"{key}={value} (the config: {wanted})" for key, (value, wanted) in values.items())
        paste = " ".join(f"model.{key}={value}" for key, (value, _) in values.items())
        alternative = "; or a smaller block_size" if "block_size" in differing else ""
        raise UserError(f"{folder} has {found}: add {paste}{alternative}")
