"""The Python door: a checkpoint, a dataset or a run in a notebook (docs/python.md).

    model = pipeline.load("best");  model.generate("def ", max_new_tokens=50, seed=1)
    dataset = pipeline.open_dataset("data/mine");  dataset[0]
    run = pipeline.train("quickstart", **{"train.max_steps": 100});  run.metrics["loss"]

torch is imported by the functions that need it: opening a dataset does not.
"""

import json
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.keys import Config
from pipeline.config.load import load_config, override
from pipeline.dataset.scan import DocumentFinder, Positions, blocks
from pipeline.dataset.shards import Manifest, Shard, TokenReader, load_manifest, map_shard
from pipeline.errors import UserError
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import Tokenizer, encode_prompt

if TYPE_CHECKING:
    from torch import dtype as Dtype

    from pipeline.model.decoder import Decoder
    from pipeline.model.language_model import LanguageModel

__all__ = ["Dataset", "Model", "Run", "UserError", "load", "open_dataset", "train"]

Ids = Sequence[int] | npt.NDArray[Any] | Any  # or a tensor of torch, on any device
TRAIN = "train"


def load(
    checkpoint: str | Path = "latest", *, run_dir: str | Path | None = None, device: str = "auto", dtype: str = "auto"
) -> "Model":
    """The model of a checkpoint: "latest", "best", "average", a path, a run's folder, or hf:ORG/NAME. Raises
    UserError.

    `run_dir` is the run of the first three, by default the newest under runs/; `device` and
    `dtype` are as for `pipeline sample`.
    """
    from pipeline.checkpoint.find import find_checkpoint
    from pipeline.checkpoint.load import load_model
    from pipeline.machine.device import pick_device, pick_dtype

    folder = find_checkpoint(str(checkpoint), None if run_dir is None else Path(run_dir))
    place = pick_device(device)
    model, tokenizer = load_model(folder)
    kind, _ = pick_dtype(dtype, place, model.config.n_embd)
    return Model(folder, model.to(place).eval(), tokenizer, kind)


@dataclass(frozen=True)
class Model:
    """A trained model with its tokenizer. `model` is the torch module, with weights in float32; it
    computes in `dtype`.
    """

    folder: Path
    model: "LanguageModel" = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    dtype: "Dtype"

    @cached_property
    def _decoder(self) -> "Decoder":
        from pipeline.model.decoder import Decoder

        # Holds weights as it multiplies them, a second copy, so it is made for the first text and
        # kept.
        return Decoder(self.model, 1, self.dtype)

    def generate(self, prompt: str = "", **options: Any) -> str:
        """The continuation of `prompt` alone; without a prompt, the start of a document. Raises
        UserError.

        `options` are those of `pipeline sample`, with its defaults: max_new_tokens, temperature,
        top_k, top_p, min_p, repetition_penalty, stop (a text or a list of them) and seed.
        """
        from sample.continuation import Continuation, grow
        from sample.generate import generate
        from sample.options import Choice, SampleOptions, check_options

        # The other options of `pipeline sample` are about prompts, files, devices and output.
        known = {"max_new_tokens", "stop", "seed", *(entry.name for entry in fields(Choice))}
        if unknown := options.keys() - known:
            raise UserError(f"unknown option {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
        if isinstance(options.get("stop"), str):
            options["stop"] = [options["stop"]]
        chosen = SampleOptions(**options)
        check_options(chosen)
        ids = encode_prompt(prompt, self.tokenizer) if prompt else [self.tokenizer.end_of_text]
        seed = int.from_bytes(os.urandom(4)) if chosen.seed is None else chosen.seed
        text = Continuation(self.tokenizer, ids if prompt else [], chosen.stop)
        steps = generate(self._decoder, ids, max_new_tokens=chosen.max_new_tokens, choice=chosen, seed=seed)
        for _ in grow([text], steps):
            pass
        return text.text

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without end-of-text. Raises UserError for a character outside the
        vocabulary.
        """
        ids: list[int] = self.tokenizer.encode(text).tolist()
        return ids

    def decode(self, ids: Ids) -> str:
        """The text of `ids`, U+FFFD for bytes that are not UTF-8. Raises UserError for an id
        outside the vocabulary.
        """
        return decoded(self.tokenizer, as_ids(ids, self.tokenizer.vocab_size))

    def loss(self, ids: Ids) -> float:
        """The mean cross-entropy, in nats a token, of each id but the first, given those before it.

        More ids than block_size + 1 are cut into windows, as `pipeline eval` does. Raises UserError
        for fewer than two.
        """
        import torch

        from pipeline.machine.device import autocast

        given = torch.from_numpy(as_ids(ids, self.tokenizer.vocab_size)).to(self._decoder.device)
        if len(given) < 2:
            raise UserError(f"the loss needs at least two ids, one to predict the other from: found {len(given)}")
        # Windows as `pipeline eval` takes them by default: each id but the first is scored exactly
        # once.
        total, block_size = 0.0, self.model.config.block_size
        with torch.inference_mode(), autocast(given.device, self.dtype):
            for start in range(0, len(given) - 1, block_size):
                window = given[start : start + block_size + 1]
                # Weighted by its targets, as the last window may be shorter.
                total += float(self.model(window[None, :-1], window[None, 1:])) * (len(window) - 1)
        return total / (len(given) - 1)


def open_dataset(path: str | Path) -> "Dataset":
    """The dataset in a folder, or of a name under data/. Raises UserError where there is none."""
    folder = Config().dataset_dir(str(path))
    return Dataset(folder, load_manifest(folder))


@dataclass(frozen=True)
class Dataset:
    """The documents of a dataset's train split, by number. They are read when they are asked
    for.
    """

    folder: Path
    manifest: Manifest = field(repr=False)
    _found: dict[int, tuple[Positions, Positions]] = field(default_factory=dict, repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return from_spec(self.manifest.tokenizer, self.folder)

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def __getitem__(self, number: int) -> str:
        """The text of a document; a negative number counts from the end. Raises IndexError."""
        number = operator.index(number)  # raises TypeError for a slice or a float
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}: expected {-len(self)} to {len(self) - 1}")
        number %= len(self)
        shard = int(np.searchsorted(self._first_documents, number, side="right")) - 1
        # Only this document's shard is scanned, not the whole split.
        starts, lengths = self._documents(shard)
        start, length = (int(column[number - self._first_documents[shard]]) for column in (starts, lengths))
        ids = map_shard(self.folder, self.manifest, self._shards[shard])
        return decoded(self.tokenizer, ids[start : start + length])

    def windows(self, block_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """The split in order, as arrays of block_size + 1 ids: a block of inputs, and the target
        after the last of them.

        The last id of a window is the first of the next; ids at the end that do not fill a window
        are left out.
        """
        if block_size < 1:
            raise UserError(f"invalid block_size {block_size}: expected at least 1")
        reader = TokenReader(self.folder, self.manifest, TRAIN)
        for start in range(0, len(reader) - block_size, block_size):
            yield reader.read(start, start + block_size + 1)

    @property
    def _shards(self) -> list[Shard]:
        return self.manifest.splits[TRAIN]

    @cached_property
    def _first_documents(self) -> npt.NDArray[np.int64]:
        """The number of each shard's first document, and at the end how many there are."""
        # A manifest counts documents; for shards of another program they are counted here.
        counts = [
            len(self._documents(number)[0]) if shard.documents is None else shard.documents
            for number, shard in enumerate(self._shards)
        ]
        return np.cumsum([0, *counts])

    def _documents(self, shard: int) -> tuple[Positions, Positions]:
        """Where each document of a shard starts, and its ids without end-of-text. A shard is
        scanned once.
        """
        if shard not in self._found:
            finder = DocumentFinder(self.manifest)
            content = blocks(self.folder / self._shards[shard].file, self.manifest.header_bytes)
            parts = [finder.feed(np.frombuffer(block, self.manifest.dtype)) for block in content]
            start, length = finder.rest()
            if length:  # where end-of-text stands before each document, none ends the last one
                parts.append((np.array([start]), np.array([length])))
            starts, lengths = zip(*parts, strict=True)
            self._found[shard] = np.concatenate(starts), np.concatenate(lengths)
        return self._found[shard]


def train(config: str | Path = "quickstart", **changes: Any) -> "Run":
    """Train, as `pipeline train CONFIG section.key=value ...` does, and resume a run that was
    begun.

    `changes` are `section.key` and a Python value: train("quickstart", **{"train.max_steps": 100}).
    Raises UserError, and Diverged from pipeline.errors.
    """
    resolved = load_config(str(config), [override(key, value) for key, value in changes.items()])
    # After the config: a misspelt key is reported without waiting for torch.
    from sample.preview import preview
    from train.run import run

    return Run(resolved.run_dir, resolved, stopped=run(resolved, preview=preview))


@dataclass(frozen=True)
class Run:
    """A run's folder, its resolved config, and why it stopped before its last step, empty where it
    is done.
    """

    folder: Path
    config: Config = field(repr=False)
    stopped: str

    @property
    def metrics(self) -> dict[str, list[float | None]]:
        """metrics.jsonl by column: "step", "loss", "lr" and so on; None where a row has no such
        number.
        """
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def as_ids(ids: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    """Ids of any integer type, from a list, numpy or torch, as int64. Raises UserError for what are
    not ids.
    """
    # Shards hold uint16, which torch cannot index with; numpy cannot read a tensor on a GPU.
    try:
        array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    except ValueError:
        raise UserError("invalid ids, rows of different lengths: expected a row of integers") from None
    if not array.size:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"invalid ids of shape {array.shape} and type {array.dtype}: expected a row of integers")
    if not 0 <= array.min() <= array.max() < vocab_size:
        raise UserError(f"ids from {array.min()} to {array.max()}: expected 0 to {vocab_size - 1}, the vocabulary's")
    return array.astype(np.int64)


def decoded(tokenizer: Tokenizer, ids: npt.NDArray[Any]) -> str:
    """The text of `ids`, U+FFFD for bytes that are not UTF-8."""
    return tokenizer.decode_bytes(ids.tolist()).decode("utf-8", errors="replace")
