"""The loop against the plain one without a cache, against transformers, and what a seed promises."""

import itertools

import pytest
import torch

from pipeline.checkpoint.folder import to_folder
from pipeline.checkpoint.layout_gpt2 import GPT2Layout
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from sample.choice import Choice, choose
from sample.generate import DRAWN_AT_A_TIME, Tokens, generate, uniforms

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)
VOCAB_SIZE = 100
CPU = torch.device("cpu")
GREEDY = Choice(temperature=0)


def model_with_opinions() -> LanguageModel:
    """Random weights large enough that the next token depends on all the tokens before it."""
    torch.manual_seed(0)
    model = LanguageModel(CONFIG, VOCAB_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def twin_of(model: LanguageModel) -> torch.nn.Module:
    """transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers")
    twin: torch.nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2Layout().config_json(model.config, model.vocab_size, 0, "float32"))
    ).eval()
    weights = {name: to_folder(model, name, tensor) for name, tensor in model.named_parameters()}
    twin.load_state_dict(weights, strict=False)
    twin.tie_weights()  # type: ignore[operator]
    return twin


def samples(
    model: LanguageModel, prompt: list[int], number: int, steps: int, choice: Choice, seed: int = 0
) -> list[tuple[int, ...]]:
    """The tokens of each sample."""
    tokens = generate(Decoder(model, number), prompt, max_new_tokens=steps, choice=choice, seed=seed)
    return list(zip(*(step.ids for step in tokens), strict=True))


def without_cache(model: LanguageModel, prompt: list[int], steps: int, choice: Choice, seed: int) -> tuple[int, ...]:
    """The whole window through the model for every token; when it is full its older half is forgotten."""
    window, new = prompt[-CONFIG.block_size :], list[int]()
    seen = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
    seen[:, prompt] = True
    for uniform in itertools.islice(uniforms(seed, 1, CPU), steps):
        if len(window) > CONFIG.block_size:
            window = window[-(CONFIG.block_size // 2) :]
        logits = model.logits(torch.tensor([window]))[:, -1]
        new.append(int(choose(logits, choice, seen, uniform)))
        window.append(new[-1])
        seen[:, new[-1]] = True
    return tuple(new)


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 40])
@pytest.mark.parametrize(
    "choice",
    [GREEDY, Choice(), Choice(0.7, 5, 0.9), Choice(1.5, 0, 1, 0.1, 1.3)],
    ids=["greedy", "top_k", "top_p", "all"],
)
def test_the_cache_changes_no_token_also_past_the_context(prompt_length: int, choice: Choice) -> None:
    model = model_with_opinions()
    prompt = torch.randint(0, VOCAB_SIZE, (prompt_length,), generator=torch.Generator().manual_seed(1)).tolist()
    (cached,) = samples(model, prompt, 1, 60, choice, seed=3)
    with torch.inference_mode():
        assert cached == without_cache(model, prompt, 60, choice, seed=3)
    assert len(set(cached)) > 5, "a constant would equal anything"


def test_samples_share_a_prompt_and_differ_and_a_seed_repeats_them() -> None:
    model = model_with_opinions()
    first, again, other = (samples(model, [1, 2, 3], 4, 40, Choice(), seed) for seed in (5, 5, 6))
    assert first == again
    assert len({*first, *other}) == 8


def test_a_sample_is_the_same_however_many_there_are() -> None:
    """Past the context too, where each has a window of its own."""
    model = model_with_opinions()
    few, many = (samples(model, [1, 2, 3], number, 40, Choice(), seed=5) for number in (2, 5))
    assert few == many[:2]


def test_one_decoder_goes_from_prompt_to_prompt() -> None:
    decoder, fresh = (Decoder(model_with_opinions(), 2) for _ in range(2))
    for _ in range(2):
        texts = [
            list(generate(decoder, prompt, max_new_tokens=30, choice=Choice(), seed=1))
            for prompt in ([1, 2], [3], [1, 2])
        ]
        assert texts[0] == texts[2] == list(generate(fresh, [1, 2], max_new_tokens=30, choice=Choice(), seed=1))


def test_random_numbers_are_one_stream_a_sample_without_a_seam() -> None:
    rows = torch.stack(list(itertools.islice(uniforms(1, 3, CPU), 2 * DRAWN_AT_A_TIME)))
    assert ((rows >= 0) & (rows < 1)).all() and len(rows.unique()) == rows.numel()
    assert rows.mean().item() == pytest.approx(0.5, abs=0.05)
    alone = torch.stack(list(itertools.islice(uniforms(1, 1, CPU), 2 * DRAWN_AT_A_TIME)))
    assert torch.equal(alone[:, 0], rows[:, 0])


def test_greedy_samples_are_all_the_likeliest_continuation() -> None:
    model = model_with_opinions()
    rows = samples(model, [7], 3, 10, GREEDY)
    assert rows[0] == rows[1] == rows[2]
    logits = model.logits(torch.tensor([[7]]))[:, -1]
    assert rows[0][0] == logits.argmax().item()


@pytest.mark.slow
def test_a_penalised_greedy_text_equals_transformers() -> None:
    """The prompt's tokens are penalised too."""
    model = model_with_opinions()
    prompt = torch.tensor([[7, 8, 9]])
    for penalty in (1.0, 1.8):
        wanted = twin_of(model).generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        (found,) = samples(model, [7, 8, 9], 1, 12, Choice(temperature=0, repetition_penalty=penalty))
        assert list(found) == wanted[0, 3:].tolist()


def test_log_probabilities_are_the_models_own_whatever_the_filters() -> None:
    model = model_with_opinions()
    for choice in (Choice(0.5, 3, 0.8, 0.1, 1.5), GREEDY):
        steps = list(generate(Decoder(model, 2), [7, 8], max_new_tokens=12, choice=choice, seed=1, scored=True))
        for sample in range(2):
            ids = torch.tensor([[7, 8, *(step.ids[sample] for step in steps)]])
            wanted = twin_of(model)(ids).logits.log_softmax(dim=-1)[0, 1:-1].gather(1, ids[0, 2:, None])[:, 0]
            found = torch.tensor([step.log_probabilities[sample] for step in steps])
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert all(
        step.log_probabilities == []
        for step in generate(Decoder(model, 2), [7], max_new_tokens=3, choice=GREEDY, seed=1)
    )


def test_generation_is_lazy() -> None:
    steps = generate(Decoder(model_with_opinions(), 1), [1], max_new_tokens=10**9, choice=Choice(), seed=0)
    assert len(list(itertools.islice(steps, 3))) == 3


def test_nothing_is_computed_after_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[int]()
    step = Decoder.step

    def counted(self: Decoder, ids: torch.Tensor) -> torch.Tensor:
        steps.append(self.length)
        return step(self, ids)

    monkeypatch.setattr(Decoder, "step", counted)
    assert len(list(generate(Decoder(model_with_opinions(), 1), [1, 2], max_new_tokens=5, choice=GREEDY, seed=0))) == 5
    assert steps == [2, 3, 4, 5]


def test_generating_takes_no_global_random_number() -> None:
    model = model_with_opinions()
    before = torch.get_rng_state()
    samples(model, [1], 2, 20, Choice())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "choice",
    [GREEDY, Choice(), Choice(top_k=0), Choice(top_k=0, top_p=0.9), Choice(min_p=0.1, repetition_penalty=1.5)],
    ids=["greedy", "top_k", "all", "top_p", "min_p"],
)
def test_weights_that_are_not_finite_are_said_to_be_damaged_when_they_are_met(choice: Choice, number: float) -> None:
    """Those of position 6, behind a prompt of 2 tokens, are met when the fifth new one has been read."""
    model = model_with_opinions()
    with torch.no_grad():
        model.transformer.wpe.weight[6] = number
    for samples in (1, 3):
        steps = generate(Decoder(model, samples), [1, 2], max_new_tokens=20, choice=choice, seed=0)
        assert len(list(itertools.islice(steps, 5))) == 5
        with pytest.raises(UserError, match="logits are not finite, so its weights are damaged: use another"):
            next(steps)


@pytest.mark.parametrize(
    "choice", [GREEDY, Choice(), Choice(top_k=0, top_p=0.9), Choice(repetition_penalty=1.3)], ids=str
)
def test_steps_of_one_shape_choose_the_same_tokens(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU takes them, past a full window too."""

    def tokens() -> list[Tokens]:
        decoder = Decoder(model_with_opinions(), 2)
        return list(generate(decoder, [1, 2], max_new_tokens=40, choice=choice, seed=1, scored=True))

    plain = tokens()
    monkeypatch.setattr("pipeline.model.decoder.ONE_SHAPE", ("cpu",))
    for found, expected in zip(tokens(), plain, strict=True):
        assert found.ids == expected.ids
        assert found.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)
