"""A short sample of a model in training, for its log."""

import torch

from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.tokenizer import Tokenizer
from sample.continuation import Continuation, grow
from sample.generate import generate
from sample.options import Choice

# Long enough to judge the text, short enough for every evaluation.
MAX_NEW_TOKENS = 64
CHOICE = Choice(temperature=0.8, top_k=50)


def preview(model: LanguageModel, dtype: torch.dtype, tokenizer: Tokenizer, prompt: list[int], seed: int) -> str:
    """How `model`, rounded to `dtype`, continues `prompt`. Raises UserError if it is not finite."""
    text = Continuation(tokenizer, prompt)
    steps = generate(Decoder(model, 1, dtype), prompt, max_new_tokens=MAX_NEW_TOKENS, choice=CHOICE, seed=seed)
    for _ in grow([text], steps):
        pass
    return text.text
