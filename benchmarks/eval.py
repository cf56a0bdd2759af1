"""`pipeline eval` next to transformers' own loss over the same windows: tokens a second, from the folder to the figure.

Twice: a tiny model with GPT-2's vocabulary, where the logits are nearly all of the work, and GPT-2 124M.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import HERE, PIPELINE, Measurement, Options, Sides, main, run, seconds
from pipeline.checkpoint.folder import write_model
from pipeline.config.load import load_config
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.machine import ranks
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from score.options import EvalOptions
from score.run import score

SMALL = ["model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=128"]
BATCH = 8


@torch.inference_mode()
def transformers_loss(folder: Path, reader: TokenReader, block_size: int) -> float:
    """Each token but the first once, as eval does it: the last window is short."""
    from transformers import AutoModelForCausalLM

    model, total = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0
    ids = torch.from_numpy(reader.read(0, len(reader)).astype("int64"))
    complete = (len(ids) - 1) // block_size
    batches = [*range(0, complete, BATCH)]
    for first in batches:
        windows = [ids[k * block_size : (k + 1) * block_size + 1] for k in range(first, min(first + BATCH, complete))]
        batch = torch.stack(windows)
        logits = model(batch[:, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    rest = ids[complete * block_size :]
    if len(rest) > 1:
        logits = model(rest[None, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits[0], rest[1:], reduction="sum"))
    return total / (len(ids) - 1)


@contextmanager
def sides(options: Options, size: list[str], documents: int) -> Iterator[Sides]:
    tokenizer = BytePairTokenizer("gpt2")
    with tempfile.TemporaryDirectory() as name:
        folder, model_folder = Path(name), Path(name) / "model"
        model_folder.mkdir()
        limit = f"--limit-docs={20 if options.tiny else documents}"
        run([*PIPELINE, "prepare", "stdlib", "--val-fraction", "0.5", limit], folder)
        config = load_config("gpt2-124m", SMALL if options.tiny else size).model
        torch.manual_seed(0)
        write_model(model_folder, LanguageModel(config, tokenizer.vocab_size), tokenizer)
        reader = TokenReader(folder / "data/stdlib", load_manifest(folder / "data/stdlib"), "val")
        data, losses = str(folder / "data/stdlib"), {}
        asked = EvalOptions(ckpt=str(model_folder), data=data, batch_size=BATCH, device="cpu", dtype="float32")
        world = ranks.start("cpu")

        def ours() -> None:
            losses[HERE] = score(asked, world)["loss"]

        def theirs() -> None:
            losses["transformers"] = transformers_loss(model_folder, reader, config.block_size)

        def turn(work: partial[None]) -> dict[str, float]:
            found = {"speed": (len(reader) - 1) / seconds(work)}
            assert len(losses) < 2 or math.isclose(*losses.values(), rel_tol=1e-4), losses
            return found

        yield {HERE: lambda: turn(partial(ours)), "transformers": lambda: turn(partial(theirs))}


SPEED = {"speed": "tokens/s"}
MEASUREMENTS = [
    Measurement("eval.small", "2 layers, 64 wide, GPT-2's vocabulary", SPEED, partial(sides, size=SMALL, documents=30)),
    Measurement("eval.124m", "GPT-2 124M, float32", SPEED, partial(sides, size=[], documents=4), turns=3),
]

if __name__ == "__main__":
    main(MEASUREMENTS)
