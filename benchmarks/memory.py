"""Peak resident memory of a process that trains the 6 x 384 recipe, and of one that runs a plain loop on the same model."""

import multiprocessing
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from benchmarks.measure import HERE, Measurement, Options, Sides, main


def trained(side: str, options: Options) -> dict[str, float]:
    from benchmarks.step import LARGE, PlainLoop, pipeline_step, training

    with training(LARGE, options) as trainer:
        step = partial(pipeline_step, trainer)
        if side != HERE:
            step = PlainLoop(trainer).step
            trainer.model.to("meta")  # its weights are the loop's by now
        for _ in range(3):
            step()
    # Linux counts kilobytes, macOS bytes.
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)}


@contextmanager
def sides(options: Options) -> Iterator[Sides]:
    def turn(side: str) -> dict[str, float]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(trained, side, options).result()

    yield {side: partial(turn, side) for side in (HERE, "plain PyTorch loop")}


TITLE = "6 layers, 384 wide, 16 x 256 tokens"
MEASUREMENTS = [Measurement("memory.train", TITLE, {"peak": "MB"}, sides, turns=3, warm_up=False)]

if __name__ == "__main__":
    main(MEASUREMENTS)
