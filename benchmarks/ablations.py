"""What each choice of a recipe is worth: val loss at equal wall-clock time, over several seeds.

Every variant is one recipe with some keys changed. One that changes the work of a step is given the steps
that fit into the time of the recipe's: it takes a few steps in turns with the recipe, one process at a time,
and the ratio of the fastest turns sets its `train.max_steps`. Then all train with each seed, and the loss over
the val split after the last step is compared with the recipe's of the same seed.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import PIPELINE, run

PROBE_STEPS, PROBE_TURNS = 40, 4
VAL_TOKENS = 200_000  # all of tinyshakespeare's
WORK = ("model.", "optimizer.name", "optimizer.grad_clip")  # keys that change what a step takes


@dataclass(frozen=True)
class Corpus:
    """How its dataset is made, and the recipe that trains on it."""

    prepare: list[str]
    recipe: list[str]


CORPORA = {
    "shakespeare-char": Corpus(
        ["TEXT", "--name", "shakespeare-char", "--tokenizer", "char", "--val-fraction", "0.1"], ["shakespeare-fast"]
    ),
    "stdlib-bytes": Corpus(["stdlib", "--name", "stdlib-bytes", "--tokenizer", "byte"], ["quickstart"]),
    "stdlib-bpe": Corpus(
        ["stdlib", "--name", "stdlib-bpe", "--tokenizer", "bpe:2048"], ["quickstart", "data.dataset=stdlib-bpe"]
    ),
}
ADAMW = ["optimizer.name=adamw", "optimizer.lr=4e-3", "schedule.warmup_steps=20"]
VARIANTS: dict[str, list[str]] = {
    "the recipe": [],
    "AdamW": ADAMW,
    "AdamW at lr x 0.5": [*ADAMW, "optimizer.lr=2e-3"],
    "AdamW at lr x 2": [*ADAMW, "optimizer.lr=8e-3"],
    "GPT-2's blocks": ["model.arch=gpt2", "model.bias=false"],
    "GPT-2's blocks with AdamW": [*ADAMW, "model.arch=gpt2", "model.bias=false"],
    "cosine": ["schedule.kind=cosine"],
    "tied head": ["model.tie_weights=true"],
    "one head of keys": ["model.n_kv_head=1"],
    "cooldown of a fifth": ["schedule.cooldown_steps=0"],
    "lr x 0.5": ["optimizer.lr*0.5"],
    "lr x 2": ["optimizer.lr*2"],
    "weight decay 0": ["optimizer.weight_decay=0"],
    "no clipping": ["optimizer.grad_clip=0"],
}


class Bench:
    """A folder with a corpus, in which variants are trained."""

    def __init__(self, corpus: Corpus, text: Path | None, folder: Path) -> None:
        self.folder, self.recipe = folder, corpus.recipe
        self.pipeline("prepare", *(str(text) if word == "TEXT" else word for word in corpus.prepare))
        self.config = json.loads(self.pipeline("config", *self.recipe, "--json"))

    def pipeline(self, *words: str) -> str:
        """stdout of a command, with one thread, so that several may run."""
        return run([*PIPELINE, *words], self.folder, OMP_NUM_THREADS="1")

    def value(self, key: str) -> float:
        return float(self.config[key]["value"])

    def settings(self, variant: str, steps: int) -> list[str]:
        """The keys of a variant, with those that follow from its number of steps."""
        scaled = [setting.partition("*") for setting in VARIANTS[variant] if "*" in setting]
        plain = [setting for setting in VARIANTS[variant] if "*" not in setting]
        cooldown = round(self.value("schedule.cooldown_steps") * steps / self.value("train.max_steps"))
        return [
            *self.recipe, f"train.max_steps={steps}", f"schedule.cooldown_steps={cooldown}", *plain,
            *(f"{key}={self.value(key) * float(factor)}" for key, _, factor in scaled),
            "log.tensorboard=false", "eval.sample_prompt=",
        ]  # fmt: skip

    def train(self, variant: str, steps: int, *more: str) -> dict[str, float]:
        """The last line of a run: its val loss and seconds of training."""
        found: dict[str, float] = json.loads(
            self.pipeline("train", *self.settings(variant, steps), *more).splitlines()[-1]
        )
        return found

    def step_s(self, variant: str, turn: int) -> float:
        name = f"run.name=probe-{list(VARIANTS).index(variant)}-{turn}"
        return self.train(variant, PROBE_STEPS, name, "eval.every_steps=0")["seconds"] / PROBE_STEPS

    def loss(self, variant: str, steps: int, seed: int) -> float:
        number = list(VARIANTS).index(variant)
        whole = [f"eval.tokens={VAL_TOKENS}", f"eval.every_steps={steps}", f"checkpoint.every_steps={steps}"]
        return self.train(variant, steps, f"run.name=v{number}-{seed}", f"run.seed={seed}", *whole)["val_loss"]


def compare(
    bench: Bench, variants: list[str], recipe_steps: int, *, seeds: int, jobs: int
) -> dict[str, dict[str, object]]:
    """By variant: its steps, the losses of its seeds."""
    probed = [variant for variant in variants if any(key.startswith(WORK) for key in VARIANTS[variant])]
    turns = [[bench.step_s(variant, turn) for variant in ("the recipe", *probed)] for turn in range(PROBE_TURNS)]
    recipe_s, *fastest = (min(times) for times in zip(*turns, strict=True))
    steps = dict.fromkeys(variants, recipe_steps)
    steps |= {variant: round(recipe_steps * recipe_s / step_s) for variant, step_s in zip(probed, fastest, strict=True)}
    tasks = [(variant, seed) for seed in range(seeds) for variant in variants]
    with ThreadPoolExecutor(jobs) as pool:
        losses = list(pool.map(lambda task: bench.loss(task[0], steps[task[0]], task[1]), tasks))
    by_variant = {
        variant: [loss for task, loss in zip(tasks, losses, strict=True) if task[0] == variant] for variant in variants
    }
    return {variant: {"steps": steps[variant], "losses": found} for variant, found in by_variant.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("--text", type=Path, help="the tinyshakespeare text, for shakespeare-char")
    parser.add_argument("--steps", type=int, help="of the recipe, instead of its own")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--only", help="variants, with commas; the recipe is always there")
    parser.add_argument("--json", type=Path, help="also write the figures of every run to this file")
    options = parser.parse_args()
    if unknown := set(filter(None, (options.only or "").split(","))) - set(VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))}: expected {', '.join(VARIANTS)}")
    variants = [name for name in VARIANTS if not options.only or name in ("the recipe", *options.only.split(","))]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(CORPORA[options.corpus], options.text and options.text.resolve(), Path(name))
        steps = options.steps or round(bench.value("train.max_steps"))
        found = compare(bench, variants, steps, seeds=options.seeds, jobs=options.jobs)
    base = found["the recipe"]["losses"]
    print(f"| {options.corpus}, {options.seeds} seeds | steps | val loss, mean | sd | against the recipe, mean | sd |")
    print("|---|---|---|---|---|---|")
    for variant, row in found.items():
        apart = [loss - own for loss, own in zip(row["losses"], base, strict=True)]
        figures = [statistics.mean(row["losses"]), statistics.stdev(row["losses"])]
        difference = (
            "| | |" if variant == "the recipe" else f"| {statistics.mean(apart):+.4f} | {statistics.stdev(apart):.4f} |"
        )
        print(f"| {variant} | {row['steps']} | {figures[0]:.4f} | {figures[1]:.4f} {difference}")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
