"""The character-level recipes on tinyshakespeare: raw text to checkpoint, and val loss over the complete split.

nanoGPT's train.py takes turns with ours, with the flags that its README gives for a CPU; its final weights are evaluated
by its own code on the same windows. Nothing in the checkout is changed.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import HERE, PIPELINE, ROOT, Measurement, Options, Sides, main, run
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.load import load_model
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.dataset.windows import evaluation_starts, windows_at

NANOGPT = [
    *(sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"),
    *("--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0", "--always_save_checkpoint=True"),
]
NANOGPT_LOSS = """
import torch
from model import GPT, GPTConfig
state = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)["model"]
model = GPT(GPTConfig(64, 65, 4, 4, 128, 0.0, False))
model.load_state_dict(state)
model.eval()
windows = torch.load("windows.pt", weights_only=True)
windows = windows[(windows < 65).all(1)]  # its character ids are ours, which have one more for end-of-text
with torch.no_grad():
    print(sum(float(model(w[:, :-1].contiguous(), w[:, 1:].contiguous())[1]) * len(w) for w in windows.split(128)) / len(windows))
"""


def nanogpt_home(folder: Path, options: Options) -> Path | str:
    """A copy of the checkout with its data prepared, or why there is none."""
    if options.nanogpt is None or options.text is None:
        return "set NANOGPT and SHAKESPEARE"
    home = folder / "nanogpt"
    shutil.copytree(options.nanogpt, home, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    shutil.copy(options.text, home / "data" / "shakespeare_char" / "input.txt")
    run([sys.executable, "data/shakespeare_char/prepare.py"], home)
    return home


def val_windows(dataset: Path) -> torch.Tensor:
    reader = TokenReader(dataset, load_manifest(dataset), "val")
    return torch.from_numpy(windows_at(reader, evaluation_starts(reader, 64, 0), 64))


@torch.no_grad()
def train_ours(folder: Path, text: Path, preset: str, steps: list[str]) -> dict[str, float]:
    """From raw text; the loss by the model of the last checkpoint, not what training printed."""
    began = time.perf_counter()
    prepared = [
        "prepare",
        text,
        "--name",
        "shakespeare-char",
        "--tokenizer",
        "char",
        "--val-fraction",
        "0.1",
        "--force",
    ]
    run([*PIPELINE, *prepared], folder)
    run([*PIPELINE, "train", preset, "--resume", "never", *steps], folder)
    took = time.perf_counter() - began
    model = load_model(find_checkpoint("latest", None, folder / "runs"))[0].eval()
    parts = val_windows(folder / "data/shakespeare-char").split(128)
    losses = [float(model(part[:, :-1], part[:, 1:])) * len(part) for part in parts]
    shutil.rmtree(folder / "runs")
    return {"raw text to checkpoint": took, "val loss": sum(losses) / sum(map(len, parts))}


def train_nanogpt(home: Path, dataset: Path, steps: list[str]) -> dict[str, float]:
    began = time.perf_counter()
    run([sys.executable, "data/shakespeare_char/prepare.py"], home)
    run([*NANOGPT, "--eval_iters=20", *steps], home)
    took = time.perf_counter() - began
    torch.save(val_windows(dataset), home / "windows.pt")
    return {
        "raw text to checkpoint": took,
        "val loss": float(run([sys.executable, "-c", NANOGPT_LOSS], home).split()[-1]),
    }


@contextmanager
def sides(options: Options, preset: str) -> Iterator[Sides]:
    if options.text is None:
        yield {HERE: "set SHAKESPEARE to the text"}
        return
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name), nanogpt_home(Path(name), options)
        ours = ["train.max_steps=20"] if options.tiny else []
        theirs = ["--max_iters=20", "--eval_interval=20"] if options.tiny else []
        dataset = folder / "data/shakespeare-char"
        nanogpt = home if isinstance(home, str) else partial(train_nanogpt, home, dataset, theirs)
        yield {HERE: partial(train_ours, folder, options.text, preset, ours), "nanoGPT, its recipe for a CPU": nanogpt}


FIGURES = {"raw text to checkpoint": "s", "val loss": "nats"}
MEASUREMENTS = [
    Measurement(name.replace("-", ".", 1), f"`{name}`", FIGURES, partial(sides, preset=name), turns=3, warm_up=False)
    for name in ("shakespeare-char", "shakespeare-fast")
    if (ROOT / "configs" / f"{name}.toml").exists()
]

if __name__ == "__main__":
    main(MEASUREMENTS)
