"""The character-level recipe on tinyshakespeare: val loss over the complete split, and wall-clock time.

With --nanogpt DIR, a checkout of nanoGPT, its train.py takes turns with ours, with the same sizes and steps
and the flags that its README gives for a CPU. Its final weights are evaluated on the same windows. Nothing
in DIR is changed.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
import torch

from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.load import load_model
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.dataset.windows import evaluation_starts, windows_at
from pipeline.model.language_model import LanguageModel

BLOCK_SIZE = 64
NANOGPT_FLAGS = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
    "--always_save_checkpoint=True",
]


def run(command: list[str], folder: Path) -> float:
    """Wall-clock seconds of a command; its output is printed only if it fails."""
    started = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - started


def whole_split_loss(model: LanguageModel, dataset: Path) -> float:
    reader = TokenReader(dataset, load_manifest(dataset), "val")
    starts = evaluation_starts(reader, BLOCK_SIZE, 0)
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(starts), 128):
            windows = torch.from_numpy(windows_at(reader, starts[at : at + 128], BLOCK_SIZE))
            total += float(model.eval()(windows[:, :-1], windows[:, 1:])) * len(windows)
    return total / len(starts)


def train_ours(folder: Path, text: Path) -> tuple[float, float]:
    """Seconds from raw text to the last checkpoint, and the loss."""
    pipeline = [sys.executable, "-m", "pipeline"]
    prepare = [
        *pipeline,
        "prepare",
        str(text),
        "--name",
        "shakespeare-char",
        "--tokenizer",
        "char",
        "--val-fraction",
        "0.1",
    ]
    seconds = run(prepare, folder) + run([*pipeline, "train", "shakespeare-char"], folder)
    ckpt = find_checkpoint("latest", None, folder / "runs")
    return seconds, whole_split_loss(load_model(ckpt)[0], folder / "data" / "shakespeare-char")


def train_nanogpt(folder: Path, checkout: Path, text: Path, dataset: Path) -> tuple[float, float]:
    """The same for nanoGPT. Its character ids equal ours, which have one more id for end-of-text."""
    home = folder / "nanogpt"
    shutil.copytree(checkout, home, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(text, home / "data" / "shakespeare_char" / "input.txt")
    seconds = run([sys.executable, "data/shakespeare_char/prepare.py"], home)
    seconds += run([sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS], home)
    state = torch.load(home / "out-shakespeare-char" / "ckpt.pt", weights_only=True)["model"]
    return seconds, nanogpt_loss(home, state, dataset)


def nanogpt_loss(home: Path, state: dict[str, torch.Tensor], dataset: Path) -> float:
    """The loss by nanoGPT's model code, in a separate process, on the windows that ours is evaluated on."""
    reader = TokenReader(dataset, load_manifest(dataset), "val")
    windows = torch.from_numpy(windows_at(reader, evaluation_starts(reader, BLOCK_SIZE, 0), BLOCK_SIZE))
    torch.save({"state": state, "windows": windows}, home / "evaluate.pt")
    program = (
        "import torch; from model import GPT, GPTConfig; d = torch.load('evaluate.pt', weights_only=True); "
        "m = GPT(GPTConfig(64, 65, 4, 4, 128, 0.0, False)); m.load_state_dict(d['state']); m.eval(); "
        "w = d['windows']; w = w[(w < 65).all(1)]; x, y = w[:, :-1].contiguous(), w[:, 1:].contiguous(); "
        "print('LOSS', sum(float(m(a, b)[1].detach()) * len(a) for a, b in zip(x.split(128), y.split(128))) / len(x))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=home, capture_output=True, text=True, check=True
    ).stdout
    return float(output.rpartition("LOSS")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="the tinyshakespeare text; required, nothing runs without it")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to compare with")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures of every run to this file")
    options = parser.parse_args()
    if options.text is None:
        print("shakespeare_char: skipped, no --text given")
        return
    ours, theirs = [], []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            ours.append(train_ours(folder, options.text.resolve()))
            if options.nanogpt:
                dataset = folder / "data" / "shakespeare-char"
                theirs.append(train_nanogpt(folder, options.nanogpt.resolve(), options.text.resolve(), dataset))
    print("| tinyshakespeare, 2,000 steps | seconds, median | val loss, median |\n|---|---|---|")
    for name, runs in (("pipeline", ours), ("nanoGPT", theirs)):
        if runs:
            seconds, losses = zip(*runs, strict=True)
            print(f"| {name} | {statistics.median(seconds):.1f} | {statistics.median(losses):.4f} |")
    if theirs:
        ratios = [peer[0] / own[0] for own, peer in zip(ours, theirs, strict=True)]
        print(f"\nnanoGPT's time over ours, median of {len(ratios)} pairs: {statistics.median(ratios):.2f}")
    if options.json:
        options.json.write_bytes(orjson.dumps({"pipeline": ours, "nanoGPT": theirs}))


if __name__ == "__main__":
    main()
