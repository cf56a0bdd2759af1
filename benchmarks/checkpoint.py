"""How long saving GPT-2 124M with AdamW's moments (1.5 GB) stalls training, next to saves that it waits for."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch

from benchmarks.measure import HERE, Measurement, Options, Sides, main, seconds
from pipeline.checkpoint.folder import Description, State, write_checkpoint
from pipeline.config.load import load_config, to_dict
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from train.optimizer.groups import build_optimizer
from train.saving import Saver


@contextmanager
def sides(options: Options) -> Iterator[Sides]:
    size = ["model.n_layer=2", "model.n_head=2", "model.n_embd=32"] if options.tiny else []
    config, tokenizer = load_config("gpt2-124m", size), BytePairTokenizer("gpt2")
    model = LanguageModel(config.model, tokenizer.vocab_size)
    optimizer = build_optimizer(model, config.optimizer)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    description = Description(step=1, tokens=8, config=to_dict(config), tokenizer=tokenizer.spec(), dataset="")
    saver = Saver()
    saver.reserve(State.of(model, optimizer))
    while saver.busy:
        time.sleep(0.01)
    with tempfile.TemporaryDirectory() as name:

        def write(state: State) -> None:
            write_checkpoint(Path(name), state, model, tokenizer, description=description)

        def background() -> dict[str, float]:
            found = {"training stands still": seconds(lambda: saver.start(State.of(model, optimizer), write))}
            saver.wait()
            return found

        def synchronous() -> dict[str, float]:
            return {"training stands still": seconds(lambda: write(deepcopy(State.of(model, optimizer))))}

        def torch_save() -> dict[str, float]:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            return {"training stands still": seconds(lambda: torch.save(state, Path(name) / "ckpt.pt"))}

        yield {HERE: background, "the same, waited for": synchronous, "torch.save": torch_save}
    saver.close()


MEASUREMENTS = [Measurement("checkpoint.124m", "GPT-2 124M, saved", {"training stands still": "s"}, sides)]

if __name__ == "__main__":
    main(MEASUREMENTS)
