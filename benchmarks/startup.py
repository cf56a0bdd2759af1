"""How long programs take to start: `--help`, training to its first step, and a resume of GPT-2 124M."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import HERE, PIPELINE, ROOT, Measurement, Options, Sides, main, run, seconds
from benchmarks.shakespeare import NANOGPT, nanogpt_home
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.load import load_model

POLL_S, LIMIT_S = 0.005, 300.0
TRAIN = ["run.dir=runs", "log.every_steps=1", "eval.every_steps=0", "checkpoint.every_steps=1000000"]
# What a script does at the least: read the tensors, build model and optimizer, take a step.
PLAIN_RESUME = """
import sys, torch
from pipeline.config.load import load_config
from pipeline.model.language_model import LanguageModel
model = LanguageModel(load_config("gpt2-124m", sys.argv[2:]).model, 50257)
optimizer = torch.optim.AdamW(model.parameters())
state = torch.load(sys.argv[1], weights_only=True)
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
ids = torch.zeros(1, 64, dtype=torch.long)
model(ids, ids).backward()
optimizer.step()
"""


def timed(command: list[str]) -> Callable[[], dict[str, float]]:
    return lambda: {"start": seconds(partial(run, command))}


def until(wanted: str, command: list[str], folder: Path, metrics: Path | None = None) -> dict[str, float]:
    """Seconds from a program's start until what it prints, or its rows, match `wanted`; then it is killed."""
    output, environment = folder / "printed.txt", os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    with output.open("w") as stream:
        program = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        while not ((metrics or output).exists() and re.search(wanted, (metrics or output).read_text())):
            if program.poll() is not None or time.perf_counter() - began > LIMIT_S:
                sys.exit(f"{' '.join(command)} took no step:\n{output.read_text()[-2000:]}")
            time.sleep(POLL_S)
        return {"start": time.perf_counter() - began}
    finally:
        program.kill()
        program.wait()


@contextmanager
def help_sides(options: Options) -> Iterator[Sides]:
    python = [sys.executable, "-c"]
    yield {
        HERE: timed([*PIPELINE, "--help"]), "python -c pass": timed([*python, "pass"]),
        "import torch": timed([*python, "import torch"]),
    }  # fmt: skip


@contextmanager
def first_step_sides(options: Options) -> Iterator[Sides]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = options.text or "stdlib"
        run(
            [*PIPELINE, "prepare", text, "--name", "shakespeare-char", "--tokenizer", "byte", "--limit-docs=99"], folder
        )
        ours = [*PIPELINE, "train", "shakespeare-char", *TRAIN]
        home = nanogpt_home(folder, options)

        def turn() -> dict[str, float]:
            shutil.rmtree(folder / "runs", ignore_errors=True)
            return until(r'"step": ?1,', ours, folder, folder / "runs/shakespeare-char/metrics.jsonl")

        nanogpt = home if isinstance(home, str) else partial(until, "iter 0:", [*NANOGPT, "--eval_iters=1"], home)
        yield {HERE: turn, "nanoGPT": nanogpt, "import torch": timed([sys.executable, "-c", "import torch"])}


@contextmanager
def resume_sides(options: Options) -> Iterator[Sides]:
    """Sequences are short, so that the step itself takes little."""
    size = ["model.block_size=64", *(["model.n_layer=2", "model.n_head=2", "model.n_embd=32"] if options.tiny else [])]
    batch = ["data.dataset=stdlib", "train.tokens_per_step=64", "train.micro_batch_size=1"]
    with tempfile.TemporaryDirectory() as name:
        folder, metrics = Path(name), Path(name) / "runs/gpt2-124m/metrics.jsonl"
        run([*PIPELINE, "prepare", "stdlib", "--limit-docs=99"], folder)
        train = [*PIPELINE, "train", "gpt2-124m", *size, *batch, *TRAIN]
        run([*train, "train.max_steps=1"], folder)
        first_row = metrics.read_text()
        model, _ = load_model(find_checkpoint("latest", None, folder / "runs"))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 64, dtype=torch.long)).backward()
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")

        def turn() -> dict[str, float]:
            metrics.write_text(first_row)  # without the one of the turn before
            return until(r'"step": ?2,', train, folder, metrics)

        plain = [sys.executable, "-c", PLAIN_RESUME, str(folder / "state.pt"), *size]
        yield {HERE: turn, "torch.load and a step": timed(plain)}


START = {"start": "s"}
MEASUREMENTS = [
    Measurement("startup.help", "`pipeline --help`", START, help_sides, turns=15),
    Measurement("startup.first-step", "`pipeline train` to its first step", START, first_step_sides),
    Measurement("startup.resume", "GPT-2 124M, resumed to its next step", START, resume_sides),
]

if __name__ == "__main__":
    main(MEASUREMENTS)
