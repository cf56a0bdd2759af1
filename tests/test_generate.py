"""Choosing a token against transformers' processors, and generating against the plain loop without a cache."""

import itertools

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.model import GPT
from sample.generate import Choice, choose, generate, probabilities

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)
VOCAB_SIZE = 100


def model_with_opinions() -> GPT:
    """Random weights large enough that the next token depends on all the tokens before it."""
    torch.manual_seed(0)
    model = GPT(CONFIG, VOCAB_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_cache(model: GPT, prompt: list[int], steps: int, choice: Choice, generator: torch.Generator) -> list[int]:
    """The whole window through the model for every token; when it is full its older half is forgotten."""
    window, new = prompt[-CONFIG.block_size :], []
    for _ in range(steps):
        if len(window) > CONFIG.block_size:
            window = window[-(CONFIG.block_size // 2) :]
        logits = model.next_logits(torch.tensor([window]))
        new.append(int(choose(logits, choice, generator)))
        window.append(new[-1])
    return new


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 40])
@pytest.mark.parametrize("choice", [Choice(temperature=0), Choice(), Choice(temperature=0.7, top_k=5, top_p=0.9)])
def test_the_cache_changes_no_token_also_past_the_context(prompt_length: int, choice: Choice) -> None:
    model = model_with_opinions()
    prompt = torch.randint(0, VOCAB_SIZE, (prompt_length,), generator=seeded(1)).tolist()
    cached = [step[0] for step in generate(model, prompt, 1, 60, choice, seeded())]
    with torch.inference_mode():
        assert cached == without_cache(model, prompt, 60, choice, seeded())
    assert len(set(cached)) > 5, "a constant would equal anything"


def test_samples_share_a_prompt_and_differ_and_a_seed_repeats_them() -> None:
    model = model_with_opinions()
    first, again, other = (
        list(zip(*generate(model, [1, 2, 3], 4, 20, Choice(), seeded(seed)), strict=True)) for seed in (5, 5, 6)
    )
    assert first == again != other
    assert len(set(first)) == 4


def test_greedy_samples_are_all_the_likeliest_continuation() -> None:
    model = model_with_opinions()
    rows = list(zip(*generate(model, [7], 3, 10, Choice(temperature=0), seeded()), strict=True))
    assert rows[0] == rows[1] == rows[2]
    logits = model.next_logits(torch.tensor([[7]]))
    assert rows[0][0] == logits.argmax().item()


def test_generation_is_lazy() -> None:
    steps = generate(model_with_opinions(), [1], 1, 10**9, Choice(), seeded())
    assert len(list(itertools.islice(steps, 3))) == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 1.0])
def test_probabilities_equal_transformers_processors(temperature: float, top_k: int, top_p: float) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(8, VOCAB_SIZE, generator=seeded()) * 3
    chain = [processors.TemperatureLogitsWarper(temperature)]
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for processor in chain:
        expected = processor(None, expected)
    found = probabilities(logits, Choice(temperature, top_k, top_p))
    torch.testing.assert_close(found, expected.softmax(dim=-1), atol=1e-6, rtol=1e-5)
    assert ((found > 0) == (expected > -torch.inf)).all()


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    wanted = probabilities(logits, Choice(top_k=3))
    generator = seeded()
    draws = choose(logits.repeat(20_000, 1), Choice(top_k=3), generator)
    found = torch.bincount(draws, minlength=4) / 20_000
    torch.testing.assert_close(found, wanted[0], atol=0.015, rtol=0)
    assert found[3] == 0
