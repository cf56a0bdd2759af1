"""How long saving a checkpoint stalls the training of GPT-2 124M: in the background, and synchronously.

The two take turns on the same weights and optimizer state (1.5 GB); the ratio is the median over the turns.
"""

import argparse
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch

from pipeline.checkpoint.folder import Description, State, write_checkpoint
from pipeline.config.load import load_config, to_dict
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from train.optimizer.groups import build_optimizer
from train.saving import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    config, tokenizer = load_config("gpt2-124m", []), BytePairTokenizer("gpt2")
    model = LanguageModel(config.model, tokenizer.vocab_size)
    optimizer = build_optimizer(model, config.optimizer)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    description = Description(step=1, tokens=8, config=to_dict(config), tokenizer=tokenizer.spec(), dataset="")
    saver = Saver()
    saver.reserve(State.of(model, optimizer))
    while saver.busy:
        time.sleep(0.01)
    waited, stalls = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoints = Path(folder)
        for _ in range(arguments.turns):
            started = time.perf_counter()
            state = deepcopy(State.of(model, optimizer))
            write_checkpoint(checkpoints, state, model, tokenizer, description=description)
            waited.append(time.perf_counter() - started)
            started = time.perf_counter()
            saver.start(
                State.of(model, optimizer),
                lambda state: write_checkpoint(checkpoints, state, model, tokenizer, description=description),
            )
            stalls.append(time.perf_counter() - started)
            saver.wait()
    saver.close()
    ratio = statistics.median(stall / wait for stall, wait in zip(stalls, waited, strict=True))
    print(
        f"synchronous save: {statistics.median(waited):.2f} s; background save: training stalls for "
        f"{statistics.median(stalls):.3f} s, {ratio:.1%} of that"
    )


if __name__ == "__main__":
    main()
