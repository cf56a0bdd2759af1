"""Peak resident memory of a process of its own: training the 6 x 384 recipe, and evaluating."""

import multiprocessing
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from benchmarks.measure import HERE, Measurement, Options, Sides, main


def peak() -> dict[str, float]:
    """Linux counts kilobytes, macOS bytes."""
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)}


def trained(side: str, options: Options) -> dict[str, float]:
    from benchmarks.step import LARGE, PlainLoop, pipeline_step, training

    with training(LARGE, options) as trainer:
        if side == HERE:
            for _ in range(3):
                pipeline_step(trainer)
        else:
            plain = PlainLoop(trainer)
            trainer.model.to("meta")  # whose weights and optimizer's state the loop does not need
            for _ in range(3):
                plain.step()
    return peak()


def evaluated(side: str, options: Options) -> dict[str, float]:
    from benchmarks.eval import SMALL, sides

    with sides(options, size=SMALL, documents=30) as contestants:
        turn = contestants[side]
        assert not isinstance(turn, str)
        turn()
    return peak()


@contextmanager
def sides_of(options: Options, work: partial[dict[str, float]], peer: str) -> Iterator[Sides]:
    def turn(side: str) -> dict[str, float]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(work, side, options).result()

    yield {HERE: partial(turn, HERE), peer: partial(turn, peer)}


PEAK, PLAIN, THEIRS = {"peak": "MB"}, "plain PyTorch loop", "transformers"
MEASUREMENTS = [
    Measurement(
        "memory.train", "6 layers, 384 wide, 16 x 256 tokens", PEAK,
        partial(sides_of, work=partial(trained), peer=PLAIN), turns=3, warm_up=False,
    ),
    Measurement(
        "memory.eval", "`eval`, 2 layers, 64 wide, GPT-2's vocabulary", PEAK,
        partial(sides_of, work=partial(evaluated), peer=THEIRS), turns=3, warm_up=False,
    ),
]  # fmt: skip

if __name__ == "__main__":
    main(MEASUREMENTS)
