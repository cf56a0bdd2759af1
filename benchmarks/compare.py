"""`make bench-compare REV=...`: short measurements of a commit and of the working tree, in turns; fails on a regression.

Both run as programs in the same environment, through what does not change: command lines, metrics.jsonl, `pipeline.load`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from benchmarks.measure import PIPELINE, ROOT, run, seconds, take_turns
from benchmarks.page import spread

LEAST = 1.05  # a median below it is no regression, however certain
CONFIDENCE = 0.95
LEAST_TURNS = 6  # of fewer, even the smallest and the largest ratio hold the median less often than that
WARM_UP = 5  # steps
SIX = ["model.n_layer=6", "model.n_head=6", "model.n_embd=384"]
LARGE = [*SIX, "model.block_size=256", "train.tokens_per_step=4096", "train.micro_batch_size=16"]
TINY = ["model.n_layer=1", "model.n_head=1", "model.n_embd=16", "model.block_size=64"]
DECODE = """
import sys, time, pipeline
model = pipeline.load(sys.argv[1])
model.generate("import", max_new_tokens=8, seed=0)
began = time.perf_counter()
model.generate("import", max_new_tokens=int(sys.argv[2]), seed=0)
print(time.perf_counter() - began)
"""


class Verdict(StrEnum):
    """What the ratios allow to say."""

    REGRESSION = "REGRESSION"
    IMPROVEMENT = "faster"
    SAME = "no change"
    UNCERTAIN = "within the noise"


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, at 95 % or more, whatever the distribution: n turns lie on either side of it as coins fall, so the
    k smallest and k largest are left out, with k as large as 2 P(Binomial(n, 1/2) < k) <= 5 % allows. From LEAST_TURNS on.
    """
    count, ordered = len(ratios), sorted(ratios)
    outside = [2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count for k in range(count // 2 + 1)]
    least = sum(chance <= 1 - CONFIDENCE for chance in outside)
    assert least, f"{count} turns say nothing at {CONFIDENCE:.0%}"
    return ordered[least - 1], ordered[count - least]


def judge(ratios: list[float]) -> Verdict:
    """Of seconds now over seconds before, turn by turn."""
    low, high = interval(ratios)
    middle = statistics.median(ratios)
    if low > 1 and middle >= LEAST:
        return Verdict.REGRESSION
    if high < 1 and middle <= 1 / LEAST:
        return Verdict.IMPROVEMENT
    return Verdict.SAME if low > 1 / LEAST and high < LEAST else Verdict.UNCERTAIN


@dataclass(frozen=True)
class Tree:
    """A checkout, and the folder with its dataset and its run of one step."""

    code: Path
    folder: Path
    tiny: bool

    def run(self, command: list[str]) -> str:
        return run(command, self.folder, PYTHONPATH=str(self.code))

    def prepare(self) -> None:
        documents = "20" if self.tiny else "200"
        self.run([*PIPELINE, "prepare", "stdlib", "--limit-docs", documents, "--val-fraction", "0.1", "--force"])

    def train(self, name: str, steps: int, sizes: list[str]) -> list[dict[str, float]]:
        """Rows of metrics.jsonl."""
        batch = ["train.tokens_per_step=128", "train.micro_batch_size=2"] if self.tiny else []
        keys = [f"run.name={name}", f"train.max_steps={steps}", "data.dataset=stdlib", "log.every_steps=1"]
        keys += [*sizes, *(TINY if self.tiny else []), *batch, "checkpoint.resume=never", "eval.every_steps=0"]
        self.run([*PIPELINE, "train", "shakespeare-char", *keys])
        rows = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows]

    def step(self, steps: int, sizes: list[str]) -> float:
        """Seconds of the median step."""
        self.run([sys.executable, "-c", "import shutil; shutil.rmtree('runs/step', ignore_errors=True)"])
        rows = self.train("step", 2 * WARM_UP if self.tiny else steps, sizes)[WARM_UP:]
        tokens = rows[-1]["tokens"] - rows[-2]["tokens"]
        return statistics.median(tokens / row["tokens_per_s"] for row in rows)

    def decode(self) -> float:
        return float(self.run([sys.executable, "-c", DECODE, "runs/model", "10" if self.tiny else "150"]))

    def evaluate(self) -> None:
        self.run([*PIPELINE, "eval", "--ckpt", "runs/model", "--json"])


CASES: dict[str, Callable[[Tree], float]] = {
    "startup": lambda tree: seconds(partial(tree.run, [*PIPELINE, "--help"])),
    "prepare": lambda tree: seconds(tree.prepare),
    "step-small": lambda tree: tree.step(60, []),
    "step-6x384": lambda tree: tree.step(15, LARGE),
    "decoding": Tree.decode,
    "eval": lambda tree: seconds(tree.evaluate),
}


def compare(before: Tree, now: Tree, case: str, turns: int) -> tuple[str, Verdict]:
    """A row of the table."""
    sides = {tree.code: (lambda tree=tree: {"time": CASES[case](tree)}) for tree in (before, now)}
    taken = take_turns(sides, turns)
    then_s, now_s = ([turn["time"] for turn in taken[tree.code]] for tree in (before, now))
    ratios = [b / a for a, b in zip(then_s, now_s, strict=True)]
    low, high = interval(ratios)
    found, middle = judge(ratios), statistics.median(ratios)
    return (
        f"| {case} | {spread(then_s, 's')} | {spread(now_s, 's')} | {middle:.3f} | {low:.3f} to {high:.3f} | {found} |",
        found,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rev", help="a commit, branch or tag")
    parser.add_argument("--turns", type=int, default=10, help="of each side: 6 or more")
    parser.add_argument("--only", default="", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    options = parser.parse_args()
    cases, verdicts = options.only.split(",") if options.only else list(CASES), []
    if options.turns < LEAST_TURNS or set(cases) - set(CASES):
        parser.error(f"expected {LEAST_TURNS} or more --turns, and --only of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as name:
        folder = Path(name)
        git = ["git", "-C", str(ROOT), "worktree"]
        run([*git, "add", "--detach", folder / "code", options.rev])
        try:
            trees = [Tree(code, folder / side, options.tiny) for side, code in (("a", folder / "code"), ("b", ROOT))]
            for tree in trees:
                tree.folder.mkdir()
                tree.prepare()
                tree.train("model", 1, [*SIX, "model.block_size=64"])
            print(f"| | {options.rev} | working tree | times as long | 95 % interval of that | |\n{'|---' * 6}|")
            for case in cases:
                row, verdict = compare(*trees, case, options.turns)
                print(row, flush=True)
                verdicts.append(verdict)
        finally:
            subprocess.run([*git, "remove", "--force", str(folder / "code")], check=False)
    return 1 if Verdict.REGRESSION in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
