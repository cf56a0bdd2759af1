"""Each architecture against transformers', and what the padded vocabulary and the cache promise."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.budget import parameters
from pipeline.checkpoint.folder import from_folder, to_folder
from pipeline.checkpoint.layouts import layout_of
from pipeline.config.keys import ModelConfig
from pipeline.config.load import load_config
from pipeline.model.language_model import LanguageModel
from pipeline.model.qwen3 import NormOnCPU, RMSNorm

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=48)
SHAPES = {
    "gpt2": SMALL,
    "qwen3": replace(SMALL, arch="qwen3"),
    "qwen3 grouped": replace(SMALL, arch="qwen3", n_kv_head=2, head_dim=24, n_inner=80, rope_theta=500.0),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
VOCAB_SIZE = 1000  # padded to 1024 inside


def small_model(config: ModelConfig = SMALL, vocab_size: int = VOCAB_SIZE) -> LanguageModel:
    """A model whose every parameter, biases included, differs from its initial value."""
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.zero_padding()
    return model.eval()


def transformers_twin(model: LanguageModel) -> Any:
    transformers = pytest.importorskip("transformers")
    layout = layout_of(model.config)
    document = layout.config_json(model.config, model.vocab_size, 0, "float32")
    config = transformers.AutoConfig.for_model(**document)
    twin = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    named = model.named_parameters()
    weights = {layout.stored_name(name): to_folder(model, name, parameter) for name, parameter in named}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin.eval()


@every_shape
@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_loss_and_gradients_equal_transformers(shape: ModelConfig, tie_weights: bool) -> None:
    model = small_model(replace(shape, tie_weights=tie_weights))
    twin = transformers_twin(model)
    ids = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.logits(ids), twin(ids).logits, atol=1e-5, rtol=0)

    loss, twin_loss = model(ids[:, :-1], ids[:, 1:]), twin(ids, labels=ids).loss
    torch.testing.assert_close(loss, twin_loss, atol=1e-5, rtol=0)
    loss.backward()
    twin_loss.backward()
    twin_gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = to_folder(model, name, parameter.grad)
        stored = layout_of(shape).stored_name(name)
        torch.testing.assert_close(gradient, twin_gradients[stored], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-350m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
    ],
)
def test_presets_have_the_parameter_counts_of_gpt2(preset: str, expected: int) -> None:
    assert parameters(load_config(preset, []).model, 50257) == expected


def test_initial_weights_are_normal_with_scaled_residual_projections() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(n_layer=8, n_head=4, n_embd=256, block_size=64), 5000)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            wanted = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter[:5000].std().item() == pytest.approx(wanted, rel=0.03), name
            assert abs(parameter[:5000].mean().item()) < wanted / 20, name


def test_initial_blocks_of_qwen3_add_nothing() -> None:
    model = LanguageModel(SHAPES["qwen3 grouped"], VOCAB_SIZE)
    ids = torch.randint(0, VOCAB_SIZE, (2, 48))
    hidden, table = model.transformer(ids), model.transformer.embed_tokens.weight
    torch.testing.assert_close(hidden, F.rms_norm(F.embedding(ids, table), (64,), eps=1e-6))
    assert table[:VOCAB_SIZE].std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_on_a_cpu_is_torchs(dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(4, 7, 40, dtype=dtype) + 1, torch.randn(40), torch.randn(4, 7, 40, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    ours = NormOnCPU.apply(x, weight, dtype)
    torchs = F.rms_norm(x.float(), (40,), weight, 1e-6).to(dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    for found, wanted in zip(
        (ours, *torch.autograd.grad(ours, (x, weight), grad)),
        (torchs, *torch.autograd.grad(torchs, (x, weight), grad)), strict=True,
    ):  # fmt: skip
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, **tolerance)


def test_the_norm_elsewhere_gets_one_type_for_which_torch_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def kernel(x: torch.Tensor, shape: Any, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        taken.append((x.dtype, weight.dtype))
        return x

    monkeypatch.setattr(F, "rms_norm", kernel)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    for dtype, gains in product((torch.float32, torch.bfloat16), repeat=2):
        norm = RMSNorm(8).to("meta", gains)
        assert norm(torch.empty(2, 8, dtype=dtype, device="meta")).dtype == torch.bfloat16
    assert taken == [(torch.float32, torch.float32)] * 3 + [(torch.bfloat16, torch.bfloat16)]


def test_initial_loss_is_that_of_a_uniform_guess_over_the_real_vocabulary() -> None:
    torch.manual_seed(0)
    model = LanguageModel(SMALL, VOCAB_SIZE)
    ids = torch.randint(0, VOCAB_SIZE, (8, 49))
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.05)


@every_shape
def test_padding_changes_neither_loss_nor_gradients_and_never_moves(shape: ModelConfig) -> None:
    model = small_model(shape)
    ids = torch.randint(0, VOCAB_SIZE, (4, 49))
    hidden = model.transformer(ids[:, :-1])
    exact = F.cross_entropy((hidden @ model.lm_head.weight[:VOCAB_SIZE].t()).flatten(0, 1), ids[:, 1:].flatten())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loss = model(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, exact)
    loss.backward()
    optimizer.step()
    assert model.lm_head.weight.shape[0] == 1024
    assert not model.lm_head.weight[VOCAB_SIZE:].any()
    assert model.logits(ids[:, :48]).shape[-1] == VOCAB_SIZE


@every_shape
def test_a_token_sees_itself_and_the_past_only(shape: ModelConfig) -> None:
    model = small_model(shape)
    ids = torch.randint(0, VOCAB_SIZE, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % VOCAB_SIZE
    before, after = model.logits(ids), model.logits(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(dim=-1).all()


@every_shape
def test_dropout_acts_in_training_and_not_in_evaluation(shape: ModelConfig) -> None:
    model = small_model(replace(shape, dropout=0.5))
    ids = torch.randint(0, 100, (2, 16))
    model.train()
    assert model(ids, ids) != model(ids, ids)
    model.eval()
    assert model(ids, ids) == model(ids, ids)


@pytest.mark.parametrize("shape", [replace(SMALL, bias=False), SHAPES["qwen3"]], ids=["gpt2", "qwen3"])
def test_without_bias_no_bias_parameter_is_left(shape: ModelConfig) -> None:
    model = LanguageModel(shape, 100)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


@every_shape
def test_folder_layout_is_its_own_inverse(shape: ModelConfig) -> None:
    model = small_model(shape)
    for name, parameter in model.named_parameters():
        stored = to_folder(model, name, parameter)
        assert torch.equal(from_folder(model, name, stored), parameter), name


def packed(*documents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents one after the other in a window, and the number of each token's document."""
    ids = torch.tensor([[token for document in documents for token in document]])
    numbers = torch.tensor([[number for number, document in enumerate(documents) for _ in document]])
    return ids, numbers


@every_shape
def test_documents_packed_into_a_window_have_the_logits_of_each_alone(shape: ModelConfig) -> None:
    model = small_model(shape)
    documents = [[7, 8, 9, 10], [1], [5, 6, 5, 6, 5, 6, 5], list(range(100, 130))]
    ids, numbers = packed(*documents)
    together = model.logits(ids, numbers)
    at = 0
    for document in documents:
        alone = model.logits(torch.tensor([document]))
        torch.testing.assert_close(together[:, at : at + len(document)], alone, atol=1e-5, rtol=0)
        at += len(document)
    assert not torch.allclose(together, model.logits(ids), atol=1e-3), "without the numbers, documents see each other"


@every_shape
def test_one_document_is_the_plain_model(shape: ModelConfig) -> None:
    model = small_model(shape)
    ids, numbers = packed(list(range(40)))
    torch.testing.assert_close(model.logits(ids, numbers), model.logits(ids), atol=1e-5, rtol=0)


@every_shape
def test_no_gradient_crosses_a_document_or_a_row(shape: ModelConfig) -> None:
    model = small_model(shape)
    ids, numbers = packed([11, 12, 13], [21, 22, 23, 24])
    ids, numbers = torch.cat([ids, ids + 30]), torch.cat([numbers, 0 * numbers])
    model.logits(ids, numbers)[0, 4].sum().backward()
    gradient = model.transformer.token_embedding.weight.grad
    assert gradient is not None
    # Logits of every token are summed, so the tied head gives every row the same gradient; inputs stand out from it.
    plain = gradient[500]
    touched = [token for token in range(500) if not torch.allclose(gradient[token], plain, atol=1e-6)]
    assert touched == [21, 22]
