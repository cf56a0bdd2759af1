"""What logging and watching cost a step of the small CPU recipe: steps with all of it next to steps without.

With: rows, status.json and its thread, TensorBoard, figures by layer, and the panel on a pseudo-terminal, while another
process runs `watch` on the run's files. Processor time, as a machine is seldom idle.
"""

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.measure import HERE, Measurement, Options, Sides, main
from benchmarks.step import SMALL, Clock, training
from pipeline.log import configure
from pipeline.machine.terminal import RunDisplay
from pipeline.runs import RunFolder
from train.metrics.record import FileMetrics
from train.metrics.tensorboard import TensorBoard

WATCH = (
    "import pathlib, time; from pipeline.runs import RunFolder\n"
    "while True: RunFolder(pathlib.Path({path!r})).summary(); time.sleep(2)"
)


def terminal() -> None:
    """Make stderr a terminal of 120 columns that somebody reads."""
    ours, theirs = pty.openpty()
    os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
    sys.stderr = os.fdopen(theirs, "w")
    subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    configure()


@contextmanager
def sides(options: Options) -> Iterator[Sides]:
    with ExitStack() as stack:
        trainer = stack.enter_context(training(SMALL, options))
        terminal()
        folder, count, clock = RunFolder(trainer.config.run_dir), 5 if options.tiny else 100, Clock(time.thread_time)
        folder.path.mkdir(parents=True)
        metrics = FileMetrics(folder, [TensorBoard(folder, 0)])
        display = stack.enter_context(RunDisplay(trainer.status.summary))
        stack.enter_context(trainer.status)
        watcher = subprocess.Popen([sys.executable, "-c", WATCH.format(path=str(folder.path))])
        for owner, call in (
            (trainer.status, "step_ended"), (trainer.status, "update"), (trainer, "row"), (metrics, "write"),
            (trainer.layers, "before_update"), (trainer.layers, "after_update"), (display, "step_ended"),
        ):  # fmt: skip
            clock.around(owner, call, "logging")

        def turn(logging: bool) -> dict[str, float]:
            clock.seconds.clear()
            began = time.process_time()
            for _ in range(count):
                result = trainer.train_step()
                trainer.throughput.lap()
                trainer.step += 1
                if logging:
                    trainer.between_steps(result, metrics)
                    display.step_ended(is_last=False)
            took = time.process_time() - began
            inside = {"in the calls that log and draw": clock.seconds["logging"] * 1e3 / count} if logging else {}
            return {"processor time of a step": took * 1e3 / count} | inside

        yield {HERE: lambda: turn(logging=True), "without": lambda: turn(logging=False)}
        watcher.terminate()
        metrics.close()


FIGURES = {"processor time of a step": "ms", "in the calls that log and draw": "ms"}
MEASUREMENTS = [Measurement("bookkeeping.small", "4 layers, 128 wide, with logging", FIGURES, sides, turns=12)]

if __name__ == "__main__":
    main(MEASUREMENTS)
