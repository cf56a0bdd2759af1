"""Training speed against a plain float32 PyTorch loop over the same model, weights and batches, in one process.

6 layers, 384 wide, block 256, batch 16. The two take turns, a few steps each, so that a noisy machine
affects both; the ratio is the median over the turns. Losses are compared step by step, since a speedup
that changes the curve is worth nothing. Loading a batch is timed separately: training reads it ahead.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipeline.config.keys import Config
from pipeline.config.load import from_dict
from pipeline.dataset.mixture import Mixture
from pipeline.log import configure
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from prepare.run import PrepareOptions
from prepare.run import run as prepare
from train.optimizer.schedule import learning_rate
from train.run import assemble, initialise
from train.trainer import Trainer


def config_in(folder: Path, steps: int) -> Config:
    return from_dict(
        {
            "run": {"name": "bench", "dir": str(folder / "runs"), "device": "cpu"},
            "data": {"dataset": "stdlib", "data_dir": str(folder / "data")},
            "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4},
            "schedule": {"warmup_steps": 10},
            "train": {"max_steps": steps, "tokens_per_step": 16 * 256, "micro_batch_size": 16},
            "eval": {"every_steps": 0},
        }
    )


class PlainLoop:
    """The loop of a tutorial: float32, torch's default AdamW, clipping."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, config = trainer, trainer.config
        self.model = LanguageModel(config.model, trainer.model.vocab_size)
        self.model.load_state_dict(trainer.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=config.optimizer.betas, weight_decay=0.1)

    def step(self, number: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.trainer.config)
        windows = torch.from_numpy(self.trainer.mixture.batch(number * 16, 16))
        loss = self.model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="steps of each in a turn")
    options = parser.parse_args()
    configure()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(PrepareOptions(["stdlib"], data_dir=str(folder / "data"), tokenizer="byte"))
        config = config_in(folder, (options.turns + 1) * options.steps)
        trainer, _ = assemble(config, World(device=torch.device("cpu")), Mixture(config))
        initialise(trainer)
        plain = PlainLoop(trainer)
        ratios, ours_s, plain_s, gaps = [], [], [], []
        for turn in range(options.turns + 1):
            steps = range(turn * options.steps, (turn + 1) * options.steps)
            started = time.perf_counter()
            losses = [plain.step(number) for number in steps]
            middle = time.perf_counter()
            for number, loss in zip(steps, losses, strict=True):
                trainer.step = number
                gaps.append(abs(trainer.train_step().loss / loss - 1))
            ended = time.perf_counter()
            if turn:  # the first turn warms up caches and the allocator
                plain_s.append(middle - started)
                ours_s.append(ended - middle)
                ratios.append(plain_s[-1] / ours_s[-1])
        steps = range(len(gaps))
        started = time.perf_counter()
        for number in steps:
            trainer.mixture.batch(number * 16, 16)
        loading_s = (time.perf_counter() - started) / len(steps)
        step_s = statistics.median(ours_s) / options.steps
        trainer.batches.close()
        tokens = options.steps * config.train.tokens_per_step
        dtype = str(trainer.dtype).removeprefix("torch.")
        print(f"\n| training, {torch.get_num_threads()} threads | tokens/s, median |\n|---|---|")
        print(f"| plain float32 loop | {tokens / statistics.median(plain_s):,.0f} |")
        print(f"| pipeline train, {dtype} | {tokens / statistics.median(ours_s):,.0f} |")
        print(
            f"\nratio, median of {len(ratios)} turns: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        print(f"loading a batch: {loading_s / step_s:.2%} of a step")
        print(f"largest difference of the losses over {len(gaps)} steps: {max(gaps):.2%}")


if __name__ == "__main__":
    main()
