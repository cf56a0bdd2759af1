"""`pipeline export`: a checkpoint -> a folder, or a file, to hand on: without the training state, with a model card."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from export import gguf
from export.model_card import model_card
from export.options import ExportOptions
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import DESCRIPTION, read_description, write_description, write_model
from pipeline.checkpoint.load import load_model
from pipeline.errors import UserError
from pipeline.files import publish, sync
from pipeline.log import logger
from pipeline.machine.device import DTYPES
from pipeline.model.language_model import GPT

FORMATS = ("safetensors", "gguf")
GGUF_FILE, CARD = "model.gguf", "README.md"


def run(options: ExportOptions) -> None:
    """Write the copy beside its place, then give it its name. Raises UserError, also where something is there already."""
    for name, choices in (("dtype", tuple(DTYPES)), ("format", FORMATS)):
        if getattr(options, name) not in choices:
            raise UserError(f"--{name} {getattr(options, name)!r} is not one of {', '.join(choices)}")
    if options.to.suffix == ".gguf" and options.format != "gguf":
        raise UserError(f"--to {options.to} names a GGUF file: add --format gguf, or name a folder")
    to = options.to.absolute()
    _check_free(to)
    folder = find_checkpoint(options.ckpt, options.run_dir)
    model, tokenizer = load_model(folder)
    dtype = DTYPES[options.dtype]
    _check_range(model, dtype)
    saved = read_description(folder) if (folder / DESCRIPTION).is_file() else None
    name = to.stem if to.suffix == ".gguf" else to.name
    with _partial(to) as partial:
        if to.suffix == ".gguf":
            gguf.write(partial, name, model, tokenizer, dtype)
        elif options.format == "gguf":
            partial.mkdir()
            gguf.write(partial / GGUF_FILE, name, model, tokenizer, dtype)
            card = model_card(name, model, tokenizer, options.dtype, saved, GGUF_FILE)
            (partial / CARD).write_text(card, encoding="utf-8")
        else:
            partial.mkdir()
            write_model(partial, model, tokenizer, dtype)
            ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
            (partial / "generation_config.json").write_text(json.dumps(ends, indent=2), encoding="utf-8")
            if saved is not None:  # what the run was, and the vocabulary under its own name; nothing of the optimizer
                write_description(partial, replace(saved, scaler={}, bad_steps=0, grad_norms=[]))
            # Last, so that no hash of it is kept: the card is there to be written on.
            card = model_card(name, model, tokenizer, options.dtype, saved, file="")
            (partial / CARD).write_text(card, encoding="utf-8")
    logger.info("%s -> %s: %s parameters in %s", folder, options.to, f"{model.parameter_count():,}", options.dtype)


def _check_free(to: Path) -> None:
    empty = to.is_dir() and to.suffix != ".gguf" and not any(to.iterdir())
    if (to.exists() or to.is_symlink()) and not empty:
        raise UserError(
            f"{to} is there already, and nothing is overwritten: choose another place with --to, or remove it"
        )


def _check_range(model: GPT, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite, so it is damaged: take another checkpoint")
        if not parameter.to(dtype).isfinite().all():
            raise UserError(
                f"{name} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}: try bfloat16"
            )


@contextmanager
def _partial(to: Path) -> Iterator[Path]:
    """A place beside `to`, which takes its name once everything is written and synced."""
    partial = to.with_name(f".{to.name}.{os.getpid()}.partial")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for path in partial.iterdir() if partial.is_dir() else ():
            sync(path)
        publish(partial, to)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--to {to} cannot be written ({error}): make room, or choose another place") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        elif partial.is_file():
            partial.unlink()
