"""`pipeline eval` next to transformers' own loss over the same windows: tokens a second.

Twice: a tiny model with GPT-2's vocabulary, where the logits are nearly all of the work, and GPT-2 124M. The peer has a
process of its own, as it would run: in ours the allocator keeps what is freed, which spares the peer most of its time.
"""

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.nn.functional as F

from benchmarks.measure import HERE, PIPELINE, Measurement, Options, Sides, main, run
from pipeline.checkpoint.folder import write_model
from pipeline.config.load import load_config
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.machine import ranks
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from score.options import EvalOptions
from score.run import load, open_datasets, score_datasets

SMALL = ["model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=128"]
BATCH = 8


@cache
def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def transformers_turn(model_folder: Path, data: Path, block_size: int) -> tuple[float, float]:
    """The mean loss and the seconds it took. Each token but the first once, as eval does it: the last window is short."""
    model, reader = transformers_model(model_folder), TokenReader(data, load_manifest(data), "val")
    began, total = time.perf_counter(), 0.0
    ids = torch.from_numpy(reader.read(0, len(reader)).astype("int64"))
    complete = (len(ids) - 1) // block_size * block_size
    windows = ids[: complete + 1].unfold(0, block_size + 1, block_size).split(BATCH)
    for batch in [*windows, *([ids[None, complete:]] if complete < len(ids) - 1 else [])]:
        logits = model(batch[:, :-1]).logits.flatten(0, 1)
        total += float(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return total / (len(ids) - 1), time.perf_counter() - began


@contextmanager
def sides(options: Options, size: list[str], characters: int) -> Iterator[Sides]:
    tokenizer = BytePairTokenizer("gpt2")
    with tempfile.TemporaryDirectory() as name:
        folder, model_folder = Path(name), Path(name) / "model"
        model_folder.mkdir()
        text, each = Path(argparse.__file__).read_text(), 500 if options.tiny else characters // 20
        documents = [orjson.dumps({"text": text[number * each :][:each]}) for number in range(20)]
        (folder / "stdlib.jsonl").write_bytes(b"\n".join(documents))
        run([*PIPELINE, "prepare", "stdlib.jsonl", "--name", "stdlib", "--val-fraction", "0.5"], folder)
        config = load_config("gpt2-124m", SMALL if options.tiny else size).model
        torch.manual_seed(0)
        write_model(model_folder, LanguageModel(config, tokenizer.vocab_size), tokenizer)
        data, losses = folder / "data/stdlib", {}
        tokens = len(TokenReader(data, load_manifest(data), "val")) - 1
        asked = EvalOptions(ckpt=str(model_folder), data=str(data), batch_size=BATCH, device="cpu", dtype="float32")
        subject = load(model_folder, asked, ranks.start("cpu"))
        datasets = open_datasets(subject, asked)

        def pipeline_turn() -> tuple[float, float]:
            began = time.perf_counter()
            return score_datasets(subject, datasets, "val", config.block_size)["loss"], time.perf_counter() - began

        def turn(side: str, work: Callable[[], tuple[float, float]]) -> dict[str, float]:
            losses[side], took = work()
            assert len(losses) < 2 or math.isclose(*losses.values(), rel_tol=1e-4), losses
            return {"speed": tokens / took}

        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as peer:

            def peer_turn() -> tuple[float, float]:
                return peer.submit(transformers_turn, model_folder, data, config.block_size).result()

            yield {
                HERE: partial(turn, HERE, pipeline_turn), "transformers": partial(turn, "transformers", peer_turn),
            }  # fmt: skip


SPEED = {"speed": "tokens/s"}
MEASUREMENTS = [
    Measurement(
        "eval.small", "2 layers, 64 wide, GPT-2's vocabulary", SPEED, partial(sides, size=SMALL, characters=80_000)
    ),
    Measurement("eval.124m", "GPT-2 124M, float32", SPEED, partial(sides, size=[], characters=20_000), turns=3),
]

if __name__ == "__main__":
    main(MEASUREMENTS)
