"""What logging and watching cost a step of the small CPU recipe: steps with all of it and without take turns.

With: rows, status.json and its thread, TensorBoard, figures by layer, and the panel on a pseudo-terminal, while another
process runs `watch` on the run's files. Processor time, as a machine is seldom idle; and the time spent in those calls.
"""

import argparse
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from pipeline.config.load import load_config
from pipeline.dataset.mixture import Mixture
from pipeline.log import configure
from pipeline.machine.ranks import World
from pipeline.machine.terminal import RunDisplay
from pipeline.runs import RunFolder
from prepare.options import PrepareOptions
from prepare.run import run as prepare
from train.metrics.record import FileMetrics, Metrics
from train.metrics.tensorboard import TensorBoard
from train.run import assemble, initialise
from train.trainer import Trainer

WATCH = (
    "import sys, time; from pipeline.runs import RunFolder\nwhile True: RunFolder({path!r}).summary(); time.sleep(2)"
)


class Clock:
    """The processor time of this thread inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - began

        setattr(owner, name, call)


def terminal() -> None:
    """Make stderr a terminal of 120 columns that somebody reads."""
    ours, theirs = pty.openpty()
    os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
    sys.stderr = os.fdopen(theirs, "w")
    subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    configure()


def steps_of(trainer: Trainer, count: int, metrics: Metrics | None, display: RunDisplay) -> float:
    """Processor seconds of `count` steps, with what follows each of them where there are metrics."""
    began = time.process_time()
    for _ in range(count):
        result = trainer.train_step()
        trainer.throughput.lap()
        trainer.step += 1
        if metrics is not None:
            trainer.between_steps(result, metrics)
            display.step_ended(is_last=False)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100, help="steps of each in a turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        prepare(PrepareOptions(["stdlib"], name="text", data_dir=f"{name}/data", tokenizer="byte", limit_docs=200))
        where = [f"run.dir={name}/runs", f"data.data_dir={name}/data", "data.dataset=text", "train.max_steps=1000000"]
        config = load_config("shakespeare-char", [*where, "checkpoint.every_steps=1000000", "eval.every_steps=0"])
        terminal()
        folder = RunFolder(config.run_dir)
        folder.path.mkdir(parents=True)
        trainer, _ = assemble(config, World(device=torch.device("cpu")), Mixture(config))
        initialise(trainer)
        board = TensorBoard(folder, 0)
        metrics, layers = FileMetrics(folder, [board]), trainer.layers
        display = stack.enter_context(RunDisplay(trainer.status.summary))
        stack.enter_context(trainer.status)
        watcher = subprocess.Popen([sys.executable, "-c", WATCH.format(path=str(folder.path))])
        clock = Clock()
        for owner, call in (
            (trainer.status, "step_ended"), (trainer.status, "update"), (trainer, "row"), (metrics, "write"),
            (layers, "before_update"), (layers, "after_update"), (display, "step_ended"),
        ):  # fmt: skip
            clock.around(owner, call)
        trainer.throughput.start()
        steps_of(trainer, options.steps, metrics, display)  # warms up caches and the allocator
        clock.seconds, ratios, with_s, without_s = 0.0, [], 0.0, 0.0
        for _ in range(options.turns):
            before = steps_of(trainer, options.steps // 2, None, display)
            logged = steps_of(trainer, options.steps, metrics, display)
            bare = before + steps_of(trainer, options.steps // 2, None, display)
            ratios.append(logged / bare)
            with_s, without_s = with_s + logged, without_s + bare
        watcher.terminate()
        trainer.batches.close()
        metrics.close()
        own, median = clock.seconds / with_s, statistics.median(ratios) - 1
        print(f"a step: {without_s / options.turns / options.steps * 1e3:.2f} ms of processor time")
        print(
            f"with logging, median of {options.turns} turns: {median:+.2%} ({min(ratios) - 1:+.2%} to {max(ratios) - 1:+.2%})"
        )
        print(f"inside the calls that log and draw: {own:.2%} of a step")


if __name__ == "__main__":
    main()
