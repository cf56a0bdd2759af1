"""The loss from hidden states, in chunks of rows, against F.cross_entropy on complete logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_footprint import peak_of
from test_model import small_model
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.constants import CHUNK_LOGITS
from pipeline.model.loss import mean_loss, token_losses

ROWS, WIDTH, VOCABULARY, PADDED = 37, 16, 50, 64


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.zeros(PADDED, dtype=dtype)
    bias[VOCABULARY:] = -torch.inf
    return hidden, weight, bias, torch.randint(VOCABULARY, (ROWS,), generator=generator)


def complete(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def gradients(loss: Callable[..., Tensor], factor: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of hidden and weight, after the loss."""
    hidden, weight, bias, targets = inputs()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = loss(hidden, weight, bias, targets)
    (value * factor).backward()
    assert hidden.grad is not None and weight.grad is not None
    return [value.detach(), hidden.grad, weight.grad]


@pytest.fixture(params=[1 << 20, 10 * PADDED], ids=["one chunk", "four chunks"], autouse=True)
def chunk(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", request.param)


@pytest.mark.parametrize("factor", [1.0, 65536.0 / 3])
def test_value_and_gradients_are_those_of_cross_entropy(factor: float) -> None:
    for found, expected in zip(gradients(mean_loss, factor), gradients(complete, factor), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert not gradients(mean_loss)[2][VOCABULARY:].any(), "exactly zero"


def test_the_gradient_is_the_one_of_the_value_in_float64() -> None:
    hidden, weight, bias, targets = inputs(torch.float64)
    few = [tensor.detach()[:24, :3].requires_grad_() for tensor in (hidden, weight)]
    assert torch.autograd.gradcheck(lambda h, w: mean_loss(h, w, bias[:24], targets[:24] % 24), few)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_differs_by_rounding(dtype: torch.dtype) -> None:
    exact = gradients(complete)
    for found, theirs, expected in zip(
        gradients(mean_loss, dtype=dtype), gradients(complete, dtype=dtype), exact, strict=True
    ):
        assert found.dtype == torch.float32
        own_error = (theirs - expected).norm()
        assert (found - expected).norm() <= 1.5 * own_error + 1e-6, "no worse than F.cross_entropy"
    assert not gradients(mean_loss, dtype=dtype)[2][VOCABULARY:].any()


def test_a_sum_of_many_tokens_fits_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk: no loss scale is in it that could fall."""
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 40_000 * PADDED)
    weight = torch.zeros(PADDED, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = mean_loss(torch.full((40_000, 4), 2.0), weight, None, torch.zeros(40_000, dtype=torch.long))
    loss.backward()
    assert weight.grad is not None
    expected = torch.full((PADDED, 4), 2 / PADDED)
    expected[0] -= 2
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    hidden, weight, bias, targets = inputs()
    (found,) = torch.autograd.grad(mean_loss(hidden, weight.detach(), bias, targets), [hidden])
    (expected,) = torch.autograd.grad(complete(hidden, weight.detach(), bias, targets), [hidden])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert mean_loss(hidden, weight, bias, targets).grad_fn is None
    assert mean_loss(hidden.detach(), weight.detach(), bias, targets).grad_fn is None


def test_each_token_has_its_loss() -> None:
    hidden, weight, bias, targets = inputs()
    found = token_losses(hidden, weight, bias, targets)
    torch.testing.assert_close(found, F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none"))
    assert not found.requires_grad


def test_logits_never_exist_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs()
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", PADDED)
    # Two gradients of each, scaled and not, and less than half of the float32 logits.
    most = 2 * 4 * (hidden.numel() + weight.numel()) + 4 * ROWS * PADDED / 2
    assert peak_of(lambda: mean_loss(hidden, weight, bias, targets).backward()) < most


@pytest.mark.slow
def test_the_compiler_takes_it_as_one_graph() -> None:
    found = gradients(torch.compile(mean_loss, backend="aot_eager", fullgraph=True))
    for one, other in zip(found, gradients(mean_loss), strict=True):
        torch.testing.assert_close(one, other)


def test_a_damaged_model_has_no_losses() -> None:
    model = small_model()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UserError, match="logits are not finite"):
        model.token_losses(ids, ids, None, ids == 0)
