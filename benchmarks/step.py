"""A training step by part, next to the loop of a tutorial on the same model, weights and batches: float32, torch's AdamW.

Also how far the two loss curves part: a speed that changes the curve is worth nothing.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import HERE, PIPELINE, Measurement, Options, Sides, main, run
from pipeline.config.load import from_dict
from pipeline.dataset.mixture import Mixture
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from train import trainer as trainer_module
from train.metrics.record import Metrics
from train.optimizer.schedule import learning_rate
from train.run import assemble, autocast_type, initialise
from train.trainer import Trainer

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, 12
LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 16
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}, 2
PARTS = ("data", "forward", "loss", "backward", "clipping", "optimizer", "bookkeeping")


class Clock:
    """Seconds inside some functions, by name: a nested one counts in both."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.seconds = now, Counter[str]()

    def around(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[part] += self.now() - began

        setattr(owner, name, call)

    def around_blocks(self, model: LanguageModel) -> None:
        """The loss begins where the last block ends."""
        model.blocks[-1].register_forward_hook(lambda *_: self.seconds.update(block_ended=self.now()))

    def loss_of(self, call: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """A forward pass, to its two parts."""
        began, self.seconds["block_ended"] = self.now(), 0.0
        loss = call(*inputs)
        self.seconds["forward"] += self.seconds["block_ended"] - began
        self.seconds["loss"] += self.now() - self.seconds["block_ended"]
        return loss


@contextmanager
def training(recipe: tuple[dict[str, int], int], options: Options, dtype: str = "auto") -> Iterator[Trainer]:
    """A trainer on the standard library's bytes, or in tiny on some of them."""
    (model, size), torch_threads = TINY if options.tiny else recipe, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        run(
            [*PIPELINE, "prepare", "stdlib", "--tokenizer", "byte", f"--limit-docs={50 if options.tiny else 100_000}"],
            folder,
        )
        sections = {
            "run": {"name": "bench", "dir": f"{folder}/runs", "device": "cpu", "dtype": dtype},
            "data": {"dataset": "stdlib", "data_dir": f"{folder}/data"}, "model": model,
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4}, "schedule": {"warmup_steps": 10}, "eval": {"every_steps": 0},
            "train": {"max_steps": 10**6, "tokens_per_step": size * model["block_size"], "micro_batch_size": size},
            "checkpoint": {"every_steps": 10**6},
        }  # fmt: skip
        config, world = from_dict(sections), World(device=torch.device("cpu"))
        trainer, _ = assemble(config, world, Mixture(config), autocast_type(config, world))
        torch.set_num_threads(torch_threads)
        initialise(trainer)
        trainer.throughput.start()
        yield trainer
        trainer.batches.close()


class PlainLoop:
    """What a tutorial writes."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config, self.number = trainer, trainer.config, 0
        self.model = LanguageModel(self.config.model, trainer.model.vocab_size)
        self.model.load_state_dict(trainer.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=self.config.optimizer.betas, weight_decay=0.1)

    def batch(self) -> torch.Tensor:
        size = self.config.train.micro_batch_size
        return torch.from_numpy(self.trainer.mixture.batch(self.number * size, size))

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        # Not the model's own loss, which avoids what a tutorial does: all logits at once, in float32.
        hidden = self.model.transformer(windows[:, :-1], None)
        logits = F.linear(hidden, self.model.lm_head.weight, self.model.logit_bias)
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.number, self.config)
        loss = self.loss(self.batch())
        self.backward(loss)
        self.clip()
        self.update()
        self.number += 1
        return loss.item()


def pipeline_step(trainer: Trainer) -> float:
    """One with all that follows it, but for files."""
    result = trainer.train_step()
    trainer.throughput.lap()
    trainer.step += 1
    trainer.between_steps(result, Metrics())
    return result.loss


def turn(clock: Clock, step: Callable[[], float], count: int, losses: list[float]) -> dict[str, float]:
    """`count` steps: milliseconds a step and part, and what is left of it."""
    clock.seconds.clear()
    began = time.perf_counter()
    losses.extend(step() for _ in range(count))
    whole = time.perf_counter() - began
    parts = {part: clock.seconds[part] for part in PARTS[:-1]}
    parts["bookkeeping"] = whole - sum(parts.values())
    return {"step": whole * 1e3 / count} | {part: seconds * 1e3 / count for part, seconds in parts.items()}


@contextmanager
def sides(options: Options, recipe: tuple[dict[str, int], int], count: int, dtype: str = "auto") -> Iterator[Sides]:
    with training(recipe, options, dtype=dtype) as trainer:
        plain, ours, theirs = PlainLoop(trainer), Clock(), Clock()
        for owner, name, part in (
            (trainer, "micro_batch", "data"), (torch.autograd, "backward", "backward"),
            (trainer_module, "get_total_norm", "clipping"), (trainer_module, "clip_grads_with_norm_", "clipping"),
            (trainer.optimizer, "step_unless", "optimizer"),
        ):  # fmt: skip
            ours.around(owner, name, part)
        for name, part in (("batch", "data"), ("backward", "backward"), ("clip", "clipping"), ("update", "optimizer")):
            theirs.around(plain, name, part)
        for clock, owner, model in ((ours, trainer, trainer.model), (theirs, plain, plain.model)):
            name = "loss" if owner is plain else "loss_of"
            setattr(owner, name, partial(clock.loss_of, getattr(owner, name)))
            clock.around_blocks(model)
        curves: tuple[list[float], list[float]] = [], []

        def ours_turn() -> dict[str, float]:
            figures = turn(ours, lambda: pipeline_step(trainer), count, curves[0])
            gaps = [abs(a / b - 1) for a, b in zip(*curves, strict=False)]
            return figures | {"loss curves apart, at most": 100 * max(gaps, default=0.0)}

        yield {HERE: ours_turn, "plain PyTorch loop": lambda: turn(theirs, plain.step, count, curves[1])}


FIGURES = dict.fromkeys(("step", *PARTS), "ms") | {"loss curves apart, at most": "%"}
MEASUREMENTS = [
    Measurement("step.small", "4 layers, 128 wide, 12 x 64 tokens", FIGURES, partial(sides, recipe=SMALL, count=50), 9),
    Measurement("step.6x384", "6 layers, 384 wide, 16 x 256 tokens", FIGURES, partial(sides, recipe=LARGE, count=5), 7),
    Measurement(
        "step.6x384-float32", "the same in float32, as without units for bfloat16", {"step": "ms"},
        partial(sides, recipe=LARGE, count=5, dtype="float32"), 7,
    ),
]  # fmt: skip

if __name__ == "__main__":
    main(MEASUREMENTS)
