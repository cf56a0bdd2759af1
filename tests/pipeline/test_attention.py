"""Documents by their offsets, as a GPU's flash kernel takes them, against the mask that a CPU takes."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from test_model import small_model
from torch import Tensor
from torch.testing import assert_close

from pipeline.config.keys import ModelConfig
from pipeline.dataset.mixture import Mixture
from pipeline.model import attention
from pipeline.model.architecture import document_mask
from pipeline.model.attention import causal_attention, document_offsets, positions_and_scope
from pipeline.model.language_model import LanguageModel, document_numbers
from train.data.batches import model_inputs

END = 7


def varlen(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, window_size: Any
) -> Tensor:  # fmt: skip
    """In the place of torch's, which is for GPUs alone: each document by itself."""
    assert torch.equal(cu_seq_q, cu_seq_k) and window_size == (-1, 0) and cu_seq_q.dtype == torch.int32
    documents = []
    for begin, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        assert end - begin <= max_q == max_k
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        documents.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(documents)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)


def ids_with_documents(rows: int = 3, length: int = 16) -> Tensor:
    ids = torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[0, [0, 3, 4]] = END  # at the very beginning, and one right after the other
    ids[1] = torch.where(ids[1] == END, 0, ids[1])  # one document
    ids[2, -1] = END
    return ids


def mask_of(offsets: Tensor, rows: int, length: int) -> Tensor:
    """(rows, 1, length, length) of offsets, token by token."""
    numbers = torch.bucketize(torch.arange(rows * length), offsets.long(), right=True).view(rows, length)
    return document_mask(numbers)


@pytest.mark.parametrize("rows", [1, 3])
def test_offsets_say_what_the_mask_says(rows: int) -> None:
    ids = ids_with_documents()[:rows]
    offsets = document_offsets(ids, END)
    assert torch.equal(mask_of(offsets, rows, 16), document_mask(document_numbers(ids, END)))
    assert offsets[0] == 0 and offsets[-1] == ids.numel() and (offsets.diff() >= 0).all()
    positions, scope = positions_and_scope(ids, offsets)
    expected, _ = positions_and_scope(ids, document_numbers(ids, END))
    assert torch.equal(positions, expected) and scope is offsets


def test_offsets_have_few_lengths() -> None:
    """A step is compiled for each."""
    counts = {
        len(document_offsets(torch.where(torch.rand(8, 64) < share, END, 0), END))
        for share in (0.02, 0.03, 0.1, 0.9, 1)
    }
    assert all(count & (count - 1) == 0 for count in counts) and max(counts) == 1024
    assert len(document_offsets(torch.zeros(1, 8, dtype=torch.long), END)) == 2


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as many", "grouped"])
def test_attention_by_offsets_is_attention_by_mask(heads: tuple[int, int], flash: None) -> None:
    ids = ids_with_documents()
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, heads[0], 16, 8, generator=generator)
    key, value = (torch.randn(3, heads[1], 16, 8, generator=generator) for _ in range(2))
    found = causal_attention(query, key, value, scope=document_offsets(ids, END), dropout=0.0)
    mask = document_mask(document_numbers(ids, END))
    assert_close(found, causal_attention(query, key, value, scope=mask, dropout=0.0))


@pytest.mark.parametrize(
    "keys", [{}, {"activation_checkpointing": "block"}, {"arch": "qwen3", "n_kv_head": 1}], ids=str
)
def test_loss_and_gradients_by_offsets_are_those_by_mask(keys: dict[str, Any], flash: None) -> None:
    small, ids = small_model(), ids_with_documents()
    config = dataclasses.replace(small.config, block_size=16, **keys)
    torch.manual_seed(0)
    model = LanguageModel(config, small.vocab_size)
    found = []
    for documents in (document_numbers(ids, END), document_offsets(ids, END)):
        model.zero_grad()
        loss = model(ids, ids.roll(-1, 1), documents)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for masked, by_offset in zip(*found, strict=True):
        assert_close(by_offset, masked, atol=1e-6, rtol=1e-4)


def test_attention_by_offsets_compiles_as_one_graph(recwarn: pytest.WarningsRecorder) -> None:
    """And no warning tells a user of it. Traced alone: torch's kernel is for GPUs."""
    query, key, value = torch.randn(3, 3, 4, 16, 8).unbind()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return lambda *_: (torch.empty_like(query),)

    torch._dynamo.reset()
    offsets = document_offsets(ids_with_documents(), END)
    torch.compile(causal_attention, fullgraph=True, backend=backend)(query, key, value, scope=offsets, dropout=0.0)
    assert [str(node.target) for node in graphs[0].graph.nodes if "varlen" in str(node.target)] == [
        "torch_attn._varlen_attn"
    ]
    assert len(graphs) == 1 and not [str(warning.message) for warning in recwarn if "cache" in str(warning.message)]
    torch._dynamo.reset()


def test_training_takes_offsets_where_a_kernel_does(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tiny, data={"document_mask": True})
    mixture, cpu = Mixture(config), torch.device("cpu")
    windows = torch.from_numpy(mixture.batch(0, 4))
    before = windows.clone()
    assert model_inputs(windows, config, mixture, cpu)[2].shape == (4, 16)
    monkeypatch.setattr("train.data.batches.takes_offsets", lambda device, model: not model.dropout)
    ids, _, offsets = model_inputs(windows, config, mixture, cpu)
    assert offsets is not None and offsets.ndim == 1 and torch.equal(windows, before)
    assert torch.equal(mask_of(offsets, 4, 16), document_mask(document_numbers(ids, mixture.tokenizer["end_of_text"])))


@pytest.mark.parametrize(("low", "model", "capability", "expected"), [
    (True, {}, (9, 0), True), (False, {}, (9, 0), False), (True, {"dropout": 0.1}, (9, 0), False), (True, {}, (7, 5), False),
    (True, {"n_embd": 100, "n_head": 5}, (9, 0), False), (True, {"n_embd": 1024, "n_head": 2}, (9, 0), False),
])  # fmt: skip
def test_which_kernels_take_offsets(
    low: bool, model: dict[str, Any], capability: tuple[int, int], expected: bool,
    flash: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = ModelConfig(**model)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda _: low)
    assert attention.takes_offsets(torch.device("cuda"), config) is expected
    assert not attention.takes_offsets(torch.device("cpu"), config)
    monkeypatch.setattr(attention, "_has_flash_of_documents", lambda: False)
    assert not attention.takes_offsets(torch.device("cuda"), config)


def test_torchs_kernel_is_used_only_with_the_parameters_it_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen_module = pytest.importorskip("torch.nn.attention.varlen")
    attention._has_flash_of_documents.cache_clear()
    assert attention._has_flash_of_documents()
    monkeypatch.setattr(
        varlen_module, "varlen_attn", lambda query, key, value, cu_seq_q, is_causal: query
    )  # torch 2.10's
    attention._has_flash_of_documents.cache_clear()
    assert not attention._has_flash_of_documents()
    attention._has_flash_of_documents.cache_clear()
