"""Tokens a second of GPT-2 124M after a prompt of 16, top-k 50, next to transformers with its cache, and to a floor.

Random weights. The floor is each weight times one vector a sample, in torch's plain layout, and nothing else: sampling may
be faster than that, as it rearranges the weights.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.measure import HERE, Measurement, Options, Sides, main, seconds
from pipeline.checkpoint.folder import write_model
from pipeline.config.load import load_config
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from sample.choice import Choice
from sample.generate import generate

PROMPT = list(range(100, 116))
TINY = ["model.n_layer=2", "model.n_head=2", "model.n_embd=32"]


@torch.inference_mode()
def multiply(layers: list[nn.Linear], vectors: dict[int, torch.Tensor], count: int) -> None:
    for _ in range(count):
        for layer in layers:
            F.linear(vectors[layer.in_features], layer.weight)


@contextmanager
def sides(options: Options, dtype: torch.dtype, samples: int) -> Iterator[Sides]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer, count = BytePairTokenizer("gpt2"), 8 if options.tiny else 200
    model = LanguageModel(load_config("gpt2-124m", TINY if options.tiny else []).model, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), model, tokenizer)
        peer = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    model = model.to(dtype).eval()
    decoder = Decoder(model, samples, dtype)
    prompts = torch.tensor([PROMPT]).repeat(samples, 1)
    wanted = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": True, "top_k": 50, "pad_token_id": 0}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    vectors = {layer.in_features: torch.randn(samples, layer.in_features, dtype=dtype) for layer in layers}

    def turn(work: Callable[[], object]) -> dict[str, float]:
        return {"speed": samples * count / seconds(work)}

    yield {
        HERE: lambda: turn(lambda: list(generate(decoder, PROMPT, max_new_tokens=count, choice=Choice(), seed=0))),
        "transformers": lambda: turn(lambda: peer.generate(prompts, attention_mask=torch.ones_like(prompts), **wanted)),
        "bare matrix products": lambda: turn(lambda: multiply(layers, vectors, count)),
    }


MEASUREMENTS = [
    Measurement(
        f"decoding.{name}-{samples}", f"GPT-2 124M, {name}, {samples} sample(s)", {"speed": "tokens/s"},
        partial(sides, dtype=dtype, samples=samples),
    )
    for samples in (1, 8)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
]  # fmt: skip

if __name__ == "__main__":
    main(MEASUREMENTS)
