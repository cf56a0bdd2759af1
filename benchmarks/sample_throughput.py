"""Tokens per second of sampling GPT-2 124M, compared with transformers and with the bare matrix products of a token.

Random weights, a prompt of 16 tokens, 200 new tokens with top-k 50. In each round the three take turns, so
that a noisy machine affects all of them; ratios are medians over the rounds. The floor is each weight times
one vector in torch's plain layout, nothing else. A ratio to it may exceed 1, since the decoder rearranges
the weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pipeline.checkpoint.folder import write_model
from pipeline.config.load import load_config
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from sample.choice import Choice
from sample.generate import generate

PROMPT = list(range(100, 116))


def floor(model: LanguageModel, samples: int, new_tokens: int) -> Callable[[], object]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    vectors = {layer.in_features: torch.randn(samples, layer.in_features, dtype=layer.weight.dtype) for layer in layers}

    @torch.inference_mode()
    def run() -> None:
        for _ in range(new_tokens):
            for layer in layers:
                F.linear(vectors[layer.in_features], layer.weight)

    return run


def ours(model: LanguageModel, samples: int, new_tokens: int) -> Callable[[], object]:
    decoder = Decoder(model, samples, model.lm_head.weight.dtype)
    return lambda: list(generate(decoder, PROMPT, max_new_tokens=new_tokens, choice=Choice(), seed=0))


def theirs(folder: Path, dtype: torch.dtype, samples: int, new_tokens: int) -> Callable[[], object]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompts = torch.tensor([PROMPT]).repeat(samples, 1)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    mask = torch.ones_like(prompts)
    return lambda: model.generate(prompts, attention_mask=mask, do_sample=True, top_k=50, pad_token_id=0, **length)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(folder: Path, dtype: torch.dtype, *, samples: int, new_tokens: int, rounds: int) -> str:
    """One row of the table."""
    model = LanguageModel(load_config("gpt2-124m", []).model, BytePairTokenizer("gpt2").vocab_size).to(dtype).eval()
    runs = [
        floor(model, samples, new_tokens),
        theirs(folder, dtype, samples, new_tokens),
        ours(model, samples, new_tokens),
    ]
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    floor_speed, peer_speed, speed = (
        samples * new_tokens / statistics.median(column) for column in zip(*times, strict=True)
    )
    of_floor = statistics.median(row[0] / row[2] for row in times)
    of_peer = statistics.median(row[1] / row[2] for row in times)
    name = str(dtype).removeprefix("torch.")
    return f"| {name}, batch {samples} | {floor_speed:.0f} | {peer_speed:.0f} | {speed:.0f} | {of_floor:.2f} | {of_peer:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    print(
        f"| tokens/s, {torch.get_num_threads()} threads | floor | transformers | here | of the floor | of transformers |"
    )
    print("|---|---|---|---|---|---|")
    tokenizer = BytePairTokenizer("gpt2")
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), LanguageModel(load_config("gpt2-124m", []).model, tokenizer.vocab_size), tokenizer)
        for samples in (1, 8):
            for dtype in (torch.float32, torch.bfloat16):
                row = compare(Path(name), dtype, samples=samples, new_tokens=options.new_tokens, rounds=options.rounds)
                print(row, flush=True)


if __name__ == "__main__":
    main()
