"""The decoder against the model it was made from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model import decoder, products
from pipeline.model.captured import captured
from pipeline.model.decoder import Decoder, attention_kernels
from pipeline.model.language_model import LanguageModel

VOCAB_SIZE = 100  # no multiple of 64, so the head has padding
SHAPES: list[dict[str, Any]] = [
    {}, {"arch": "qwen3", "tie_weights": False}, {"arch": "qwen3", "n_head": 4, "n_kv_head": 2, "head_dim": 12},
]  # fmt: skip


def model_with_opinions(**shape: Any) -> LanguageModel:
    """Random weights large enough that the next token depends on all the tokens before it; no bias or gain is trivial."""
    torch.manual_seed(0)
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16} | shape)
    model = LanguageModel(config, VOCAB_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            # Qwen3's projections into the residual stream begin at zero.
            parameter.normal_(std=0.16) if parameter.ndim == 2 else parameter.add_(torch.randn_like(parameter))
    model.zero_padding()
    return model.eval()


def texts(samples: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (samples, length), generator=torch.Generator().manual_seed(1))


def decoded(model: LanguageModel, ids: Tensor, prompt: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits (S, T - prompt + 1, V) from the end of the first `prompt` tokens of each row on."""
    steps = Decoder(model, len(ids), dtype)
    return torch.stack(
        [steps.prefill(ids[:, :prompt]), *(steps.step(column) for column in ids[:, prompt:].unbind(1))], 1
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, {"bias": False, "tie_weights": False}], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_every_logit_is_the_models(
    samples: int, shape: dict[str, Any], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(products, "_onednn_multiplies", lambda dtype: False)
    model, ids = model_with_opinions(**shape), texts(samples, 16)
    with torch.inference_mode():
        wanted = model.logits(ids)[:, 4:]
    assert wanted.std() > 1, "logits that hardly differ would equal anything"
    assert_close(decoded(model, ids, 5), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("operator", ["_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_private_operator_of_another_signature_is_not_used(
    operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        default = staticmethod(lambda x, packed: x)

        def __call__(self, one: int, two: int, three: int) -> None: ...

    monkeypatch.setattr(torch.ops.mkldnn, operator, Other())
    found = products._onednn_multiplies.__wrapped__(dtype)
    assert not found or (dtype == torch.float32 and operator == "_is_mkldnn_bf16_supported")


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bfloat16_the_logits_are_as_near_to_float32_as_the_models_own(samples: int, shape: dict[str, Any]) -> None:
    model, ids = model_with_opinions(**shape), texts(samples, 16)
    with torch.inference_mode():
        exact = model.logits(ids)[:, 4:]
        error = (decoded(model, ids, 5, torch.bfloat16) - exact).abs().mean()
        own_error = (model.bfloat16().logits(ids)[:, 4:] - exact).abs().mean()
    assert 0 < error < 1.5 * own_error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples_share_one_reading_of_the_prompt_and_then_part(shape: dict[str, Any]) -> None:
    model, prompt, ends = model_with_opinions(**shape), texts(1, 6), texts(3, 4)
    shared, apart = Decoder(model, 3), Decoder(model, 3)
    assert_close(shared.prefill(prompt), apart.prefill(prompt.repeat(3, 1)))
    for column in ends.unbind(1):
        assert_close(shared.step(column), apart.step(column))


def test_a_prefill_forgets_what_was_before() -> None:
    model = model_with_opinions()
    used, fresh = Decoder(model, 2), Decoder(model, 2)
    used.prefill(texts(2, 16))
    assert_close(used.prefill(texts(1, 3)), fresh.prefill(texts(1, 3)))
    assert used.length == fresh.length == 3
    assert_close(used.step(torch.tensor([1, 2])), fresh.step(torch.tensor([1, 2])))


def test_more_samples_than_memory_holds_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"keys and values of 1,000,000,000 samples need 8,192 GB .*: ask for fewer samples"
    ):
        Decoder(model_with_opinions(), 1_000_000_000)


def test_the_cache_is_memory_that_is_taken_once() -> None:
    steps = Decoder(model_with_opinions(), 2)
    memory = [cache.memory.data_ptr() for cache in steps.caches]
    steps.prefill(texts(1, 15))
    steps.step(torch.tensor([1, 2]))
    assert [cache.memory.data_ptr() for cache in steps.caches] == memory
    assert steps.caches[0].memory.shape == (2, 2, 2, 16, 16)


# ---- steps of one shape, as a GPU takes them ----


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Here no graph can be captured: the steps themselves are called, and the log says so."""
    monkeypatch.setattr(decoder, "ONE_SHAPE", ("cpu",))
    yield
    assert any("without a CUDA graph" in record.message for record in caplog.get_records("call"))


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_keys_of_one_shape_give_the_models_logits(
    shape: dict[str, Any], samples: int, prompt: int, one_shape: None
) -> None:
    model, ids = model_with_opinions(**shape), texts(samples, 16)
    with torch.inference_mode():
        wanted = model.logits(ids)[:, prompt - 1 :]
    assert_close(decoded(model, ids, prompt), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_keys_of_an_earlier_text_are_not_seen(one_shape: None, shape: dict[str, Any]) -> None:
    test_a_prefill_forgets_what_was_before()
    test_samples_share_one_reading_of_the_prompt_and_then_part(shape)


def test_every_step_of_one_shape_has_the_same_memory(one_shape: None) -> None:
    """What a graph was captured with is what its replays read and write."""
    seen = set()
    steps = Decoder(model_with_opinions(), 2)
    real = steps.caches[0].extend

    def extend(key: Tensor, value: Tensor) -> Any:
        found = real(key, value)
        seen.add((found.keys.data_ptr(), found.keys.shape, found.mask.data_ptr() if found.mask is not None else 0))
        return found

    steps.prefill(texts(1, 3))
    steps.caches[0].extend = extend  # type: ignore[method-assign]
    for column in texts(2, 10).unbind(1):
        steps.step(column)
    assert len(seen) == 1


def test_a_captured_function_is_replayed_on_new_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's graphs, which records calls and runs them again."""
    calls: list[Callable[[], None]] = []

    class Graph:
        def replay(self) -> None:
            for call in calls:
                call()

    def function(inputs: Tensor) -> Tensor:
        out = torch.empty_like(inputs)
        calls[:] = [lambda: out.copy_(inputs * 2)]  # a capture runs nothing
        return out

    monkeypatch.setattr(torch.cuda, "device", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    run = captured(function, torch.zeros(2))
    assert run(torch.tensor([1.0, 2.0])).tolist() == [2, 4]
    assert run(torch.tensor([3.0, 4.0])).tolist() == [6, 8]


def test_a_capture_that_fails_says_why_and_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a stand-in for torch's `graph`, which stays on its stream where the end of a capture raises."""
    current = ["training's"]

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.name

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        current[0] = "the capture's"
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def function(inputs: Tensor) -> Tensor:
        if current[0] == "the capture's":
            raise RuntimeError("operation not permitted when stream is capturing")
        return inputs * 2

    monkeypatch.setattr(torch.cuda, "device", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock())
    assert captured(function, torch.zeros(2)) is function
    assert current == ["training's"] and "not permitted when stream is capturing" in caplog.text


def test_decoding_on_a_gpu_leaves_out_cudnns_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a plan for each number of keys."""
    allowed: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(*arguments: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*arguments, **options)

    monkeypatch.setattr("pipeline.model.cache.F.scaled_dot_product_attention", attention)
    steps = Decoder(model_with_opinions(), 1)
    outside = torch.backends.cuda.cudnn_sdp_enabled()
    plain = steps.prefill(texts(1, 5))
    monkeypatch.setattr(decoder, "attention_kernels", lambda _: attention_kernels(torch.device("cuda")))
    assert_close(steps.prefill(texts(1, 5)), plain)
    steps.step(torch.tensor([1]))
    assert allowed == [outside] * 2 + [False] * 4
    assert torch.backends.cuda.cudnn_sdp_enabled() == outside


def test_logits_that_are_not_finite_never_become_ids() -> None:
    steps = Decoder(model_with_opinions(), 2)
    steps.prefill(texts(1, 5))
    assert steps.to_host(torch.tensor([3, 4])) == [3, 4]
    steps.caches[0].memory[1, 1, 0, 0, 0] = torch.nan  # of one sample
    steps.step(torch.tensor([3, 4]))
    with pytest.raises(UserError, match="logits are not finite"):
        steps.to_host(torch.tensor([3, 4]))
