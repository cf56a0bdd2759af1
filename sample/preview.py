"""What a model that is still training writes."""

import torch

from pipeline.model.decoder import Decoder
from pipeline.model.language_model import GPT
from pipeline.vocabulary.tokenizer import Tokenizer
from sample.continuation import Continuation, grow
from sample.generate import generate
from sample.options import Choice

MAX_NEW_TOKENS = 64
CHOICE = Choice(temperature=0.8, top_k=50)


def preview(model: GPT, dtype: torch.dtype, tokenizer: Tokenizer, prompt: list[int], seed: int) -> str:
    """A few words with which `model`, rounded to `dtype`, goes on after `prompt`. Raises UserError for weights not finite."""
    text = Continuation(tokenizer, prompt)
    for _ in grow([text], generate(Decoder(model, 1, dtype), prompt, MAX_NEW_TOKENS, CHOICE, seed)):
        pass
    return text.text
