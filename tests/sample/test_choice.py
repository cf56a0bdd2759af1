"""Each filter and the draw against transformers' processors, ties included, and against the odds themselves."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sample.choice import Choice, choose, filtered, penalized

VOCAB_SIZE = 100
EVERYTHING = Choice(top_k=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits() -> Tensor:
    return torch.randn(8, VOCAB_SIZE, generator=seeded()) * 3


def logits_with_ties() -> Tensor:
    """As bfloat16 leaves them: 8 bits, so that many tokens share a logit."""
    return random_logits().bfloat16().float().mul(2).round().div(2)


def left(logits: Tensor, choice: Choice) -> Tensor:
    """(B, V): the filtered logits at their ids, -inf for the others."""
    kept, ids = filtered(logits, choice)
    return kept if ids is None else torch.full_like(logits, -torch.inf).scatter(1, ids, kept)


def by_transformers(logits: Tensor, choice: Choice, ids: Tensor | None = None) -> Tensor:
    """The chain that transformers' generate builds of these options, in its order."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    chain: list[Any] = []
    if choice.repetition_penalty != 1:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty))
    chain.append(processors.TemperatureLogitsWarper(choice.temperature))
    chain += [processors.TopKLogitsWarper(choice.top_k)] if choice.top_k else []
    chain += [processors.TopPLogitsWarper(choice.top_p)] if choice.top_p < 1 else []
    chain += [processors.MinPLogitsWarper(choice.min_p)] if choice.min_p else []
    for processor in chain:
        logits = processor(ids, logits)
    return logits


def assert_same_odds(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.softmax(dim=-1), wanted.softmax(dim=-1), atol=1e-6, rtol=1e-5)
    assert ((found > -torch.inf) == (wanted > -torch.inf)).all()


ONE_FILTER = [
    *(Choice(temperature, top_k=0) for temperature in (0.5, 1.0, 1.7)),
    *(Choice(top_k=top_k) for top_k in (1, 7, VOCAB_SIZE, 1000)),
    *(Choice(top_k=0, top_p=top_p) for top_p in (0.01, 0.1, 0.6, 0.95, 1.0)),
    *(Choice(top_k=0, min_p=min_p) for min_p in (0.001, 0.05, 0.3, 1.0)),
]
COMBINED = [Choice(*values) for values in itertools.product((0.5, 1.3), (0, 7), (0.3, 0.9), (0.02, 0.2))]


@pytest.mark.parametrize("choice", ONE_FILTER + COMBINED, ids=str)
def test_what_is_left_equals_transformers_processors(choice: Choice) -> None:
    logits = random_logits()
    assert_same_odds(left(logits, choice), by_transformers(logits, choice))
    if choice not in (Choice(top_k=0), Choice(top_k=VOCAB_SIZE), Choice(top_k=1000)):
        assert not torch.equal(left(logits, choice), logits), "a filter that does nothing would pass"


@pytest.mark.parametrize(
    "choice",
    [Choice(top_k=7), Choice(top_k=1), Choice(top_k=0, min_p=0.1), Choice(top_k=0, min_p=1.0), Choice(0.7, 7, 1, 0.1)],
    ids=str,
)
def test_tokens_that_tie_stay_together_as_in_transformers(choice: Choice) -> None:
    logits = logits_with_ties()
    found = left(logits, choice)
    assert_same_odds(found, by_transformers(logits, choice))
    tied = logits.unsqueeze(1) == logits.unsqueeze(2)
    kept = found > -torch.inf
    assert (tied.sum() > 5 * logits.numel()) and not kept.all()
    assert (kept.unsqueeze(1) == kept.unsqueeze(2))[tied].all()


@pytest.mark.parametrize("top_p", [0.3, 0.9])
@pytest.mark.parametrize("top_k", [0, 7])
def test_of_tokens_that_tie_the_nucleus_takes_as_many_as_transformers(top_p: float, top_k: int) -> None:
    """Which of them is left to the order of an unstable sort, there as here."""
    logits = logits_with_ties()
    choice = Choice(top_k=top_k, top_p=top_p)
    found, wanted = left(logits, choice), by_transformers(logits, choice)
    assert torch.equal(found.sort().values, wanted.sort().values)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_equals_transformers(penalty: float) -> None:
    """Of tokens that repeat it is paid once, by positive and negative logits in opposite directions."""
    logits = random_logits()
    ids = torch.randint(0, VOCAB_SIZE // 2, (8, 30), generator=seeded(1))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    choice = Choice(top_k=0, repetition_penalty=penalty)
    assert_same_odds(penalized(logits, seen, penalty), by_transformers(logits, choice, ids))
    everything = Choice(0.8, 20, 0.9, 0.02, penalty)
    found = left(penalized(logits, seen, penalty), everything)
    assert_same_odds(found, by_transformers(logits, everything, ids))


def test_a_penalty_changes_what_is_likeliest_too() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    seen = torch.tensor([[True, False, False]])
    greedy = Choice(temperature=0, repetition_penalty=1.5)
    assert choose(logits, greedy, seen, torch.zeros(1)).tolist() == [1]
    assert choose(logits, replace(greedy, repetition_penalty=1.1), seen, torch.zeros(1)).tolist() == [0]
    assert choose(logits, greedy, None, torch.zeros(1)).tolist() == [0]


def test_draws_follow_the_odds() -> None:
    choice = Choice(top_k=3)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniform = torch.rand(20_000, generator=seeded(), dtype=torch.float64)
    draws = choose(logits.repeat(20_000, 1), choice, None, uniform)
    found = torch.bincount(draws, minlength=4) / 20_000
    torch.testing.assert_close(found, left(logits, choice).softmax(dim=-1)[0], atol=0.015, rtol=0)
    assert found[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_range_draw_what_may_be_drawn(dtype: torch.dtype) -> None:
    """The first and the last token with a probability, though those around them have none."""
    logits = torch.full((2, VOCAB_SIZE), -torch.inf)
    logits[:, 30:70] = torch.randn(40, generator=seeded())
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    assert ends[1] < 1
    assert choose(logits, EVERYTHING, None, ends).tolist() == [30, 69]


def test_with_top_k_no_filter_looks_at_the_whole_vocabulary_again(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, sizes = random_logits(), list[int]()
    topk = torch.Tensor.topk

    def spied(self: Tensor, k: int, *arguments: Any) -> Any:
        sizes.append(k)
        return topk(self, k, *arguments)

    monkeypatch.setattr(torch.Tensor, "topk", spied)
    monkeypatch.setattr(torch.Tensor, "sort", pytest.fail)
    for choice in (Choice(0.8), Choice(0.8, 5, min_p=0.1), Choice(0.8, 5, 0.9)):
        choose(logits, choice, None, torch.rand(8, dtype=torch.float64))
    assert sizes == [51, 6, 6]
