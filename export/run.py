"""`pipeline export`: a checkpoint -> a folder or file to publish, with a model card."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from export.model_card import model_card
from export.options import ExportOptions
from pipeline.budget import parameters
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import write_description, write_model
from pipeline.checkpoint.load import read_model
from pipeline.checkpoint.open import open_model
from pipeline.errors import UserError
from pipeline.files import publish, sync
from pipeline.log import logger
from pipeline.machine.device import DTYPES
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.tokenizer import Tokenizer

FORMATS = ("safetensors", "gguf")
GGUF_FILE, CARD = "model.gguf", "README.md"


def run(options: ExportOptions) -> None:
    """Write the copy next to its final path, then rename it. Raises UserError."""
    _check_options(options)
    to, to_file = options.to.absolute(), options.to.suffix == ".gguf"
    folder = find_checkpoint(options.ckpt, options.run_dir)
    opened = open_model(folder)
    model, tokenizer, saved = read_model(opened), opened.tokenizer, opened.description
    dtype = DTYPES[options.dtype]
    _check_range(model, dtype)
    name = to.stem if to_file else to.name
    with _partial(to) as partial:
        if not to_file:
            partial.mkdir()
        gguf_file = "" if options.format == "safetensors" else GGUF_FILE
        if gguf_file:
            from export import gguf  # the only part that needs that package

            gguf.write(partial if to_file else partial / gguf_file, model, tokenizer, name=name, dtype=dtype)
        else:
            _write_folder(partial, model, tokenizer, dtype)
            # It carries the run's config and the vocabulary's name, but nothing of the optimizer.
            if saved is not None:
                write_description(partial, replace(saved, scaler={}, bad_steps=0, grad_norms=[]))
        if not to_file:
            # Written after the hashes, so that its owner may edit it. A lone file has no card, but
            # GGUF has the name and the shape in its metadata.
            card = model_card(name, model, tokenizer, dtype=options.dtype, saved=saved, file=gguf_file)
            (partial / CARD).write_text(card, encoding="utf-8")
    logger.info(f"{folder} -> {options.to}: {parameters(model.config, model.vocab_size):,} parameters, {options.dtype}")


def _check_options(options: ExportOptions) -> None:
    for name, value, choices in (("dtype", options.dtype, DTYPES), ("format", options.format, FORMATS)):
        if value not in choices:
            raise UserError(f"invalid --{name} {value!r}: expected {', '.join(choices)}")
    if options.format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf requires the package gguf, which is not installed: pip install gguf")
    is_file = options.to.suffix == ".gguf"
    if is_file and options.format != "gguf":
        raise UserError(f"--to {options.to} names a GGUF file: add --format gguf, or name a folder")
    is_empty_folder = options.to.is_dir() and not is_file and not any(options.to.iterdir())
    if (options.to.exists() or options.to.is_symlink()) and not is_empty_folder:
        raise UserError(f"{options.to} already exists and is not overwritten: choose another --to, or remove it")


def _write_folder(folder: Path, model: LanguageModel, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    write_model(folder, model, tokenizer, dtype)
    # GPT-2 has one special token; without these transformers warns at every generation.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def _check_range(model: LanguageModel, dtype: torch.dtype) -> None:
    # float16 ends at 65,504; casting would turn larger weights into infinities without a word.
    for name, parameter in model.named_parameters():
        fault = f"{name} has values that are not finite"
        if not parameter.isfinite().all():
            raise UserError(f"{fault}, so it is damaged: use another checkpoint")
        if not parameter.to(dtype).isfinite().all():
            raise UserError(f"{fault} in {str(dtype).removeprefix('torch.')}: try --dtype bfloat16")


@contextmanager
def _partial(to: Path) -> Iterator[Path]:
    """A path next to `to`, renamed to it once all is written and synced, removed after an error."""
    # With the process id, two exports to one path do not write into the same files.
    partial = to.with_name(f".{to.name}.{os.getpid()}.partial")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for path in partial.iterdir() if partial.is_dir() else ():
            sync(path)
        publish(partial, to)
    except OSError as error:
        raise UserError(f"--to {to} cannot be written ({error}): free some space, or choose another --to") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        elif partial.is_file():
            partial.unlink()
