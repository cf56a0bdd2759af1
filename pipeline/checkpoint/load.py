"""From a checkpoint, or a Hugging Face folder, to a model with its weights."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import layout_gpt2 as huggingface
from pipeline.checkpoint import safetensors_files as weights
from pipeline.checkpoint.folder import DESCRIPTION, TRAINING_STATE, read_description, verify_files
from pipeline.checkpoint.layout_gpt2 import ModelFolder
from pipeline.config.keys import ModelConfig
from pipeline.config.load import from_dict
from pipeline.errors import UserError
from pipeline.machine.device import memory
from pipeline.model.language_model import GPT
from pipeline.model.sharding import part_for
from pipeline.vocabulary.huggingface_files import fingerprints
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import Tokenizer


def identify_model(folder: Path, verified: bool = True) -> ModelFolder:
    """The model in our checkpoint, its hashes verified, or in a Hugging Face GPT-2 folder: its weights have that shape."""
    if (folder / DESCRIPTION).is_file():
        description = read_description(folder)
        config, spec = from_dict(description.config).model, description.tokenizer
        if verified:
            verify_files(folder, description, without=(TRAINING_STATE,))
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
    found = identify_model(folder)
    _check_memory(folder, found.config, found.tokenizer.vocab_size)
    model = uninitialised(found.config, found.tokenizer.vocab_size)
    load_weights(model, folder, found)
    return model, found.tokenizer


def load_initial_weights(model: GPT, tokenizer_spec: dict[str, Any], folder: Path) -> None:
    """Start a new run from a folder's weights; of its positions the first `block_size` are taken. Raises UserError unless
    they mean the same in `model` as where they are from.
    """
    found = identify_model(folder)
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
