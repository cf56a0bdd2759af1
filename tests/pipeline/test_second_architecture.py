"""A second architecture in a page: what it takes to add one, and that everything else works with it unchanged."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from test_train_run import assert_identical, renamed
from torch import Tensor, nn

from observe.inspect import describe_model
from pipeline.checkpoint.layout import Layout, Shapes, size_of
from pipeline.checkpoint.layouts import LAYOUTS
from pipeline.checkpoint.load import load_model
from pipeline.config.keys import Config, ModelConfig
from pipeline.model.architecture import Body, DecodingSteps, document_mask
from pipeline.model.cache import Cache, attend
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import ARCHITECTURES
from sample.choice import Choice
from sample.generate import generate
from score.run import EvalOptions
from score.run import run as evaluate
from train.run import run

ARCH = next(entry for entry in fields(ModelConfig) if entry.name == "arch")

# ---- the architecture: attention alone, its queries sharing one head of keys and values, without positions or biases ----


class ToyBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, width = config.n_head, config.n_embd
        self.norm = nn.RMSNorm(width)
        self.query, self.output = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key_value = nn.Linear(width, 2 * width // config.n_head, bias=False)

    def forward(
        self, x: Tensor, cache: Cache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        batch, length, _ = x.shape
        normed = self.norm(x)
        query = self.query(normed).view(batch, length, self.n_head, -1).transpose(1, 2)
        key, value = self.key_value(normed).unsqueeze(1).chunk(2, dim=-1)
        if cache is not None:
            return x + self.output(attend(query, key, value, cache))
        key, value = (part.expand(-1, self.n_head, -1, -1) for part in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None and length > 1)
        return x + self.output(y.transpose(1, 2).flatten(2))


class Toy(Body):
    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__(config, padded_vocab_size)
        self.tokens = nn.Embedding(padded_vocab_size, config.n_embd)
        self.layers = nn.ModuleList(ToyBlock(config) for _ in range(config.n_layer))

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def cache_heads(self) -> tuple[int, int]:
        return 1, self.config.n_embd // self.config.n_head

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        x: Tensor = self.tokens(ids)
        for block in self.layers:
            x = block(x, mask=None if documents is None else document_mask(documents))
        return x

    def decoding_steps(self, dtype: torch.dtype, rows: int) -> DecodingSteps:
        return DecodingSteps(
            lambda ids, positions: self.tokens(ids), [partial(block) for block in self.layers], nn.Identity()
        )


class ToyLayout(Layout):
    """The folder's names differ from the model's, and it stores one matrix as (in, out)."""

    model_type = "toy"
    vocabulary_rows = ("transformer.tokens.weight", "lm_head.weight")
    transposed = ("query.weight",)

    def config_json(self, config: ModelConfig, vocab_size: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "tie_weights")}
        return {"model_type": "toy", "vocab_size": vocab_size, **sizes}

    def model_config(self, document: dict[str, Any], path: str) -> tuple[ModelConfig, int]:
        sizes = {name: size_of(document, name, path) for name in ("n_layer", "n_head", "n_embd", "block_size")}
        config = ModelConfig(arch="toy", **sizes, tie_weights=document["tie_weights"])
        return config, size_of(document, "vocab_size", path)

    def shapes(self, config: ModelConfig, vocab_rows: int) -> Shapes:
        width, head = config.n_embd, config.n_embd // config.n_head
        block = {"query": (width, width), "output": (width, width), "key_value": (2 * head, width), "norm": (width,)}
        rows = {"tokens": (vocab_rows, width)} | ({} if config.tie_weights else {"head": (vocab_rows, width)})
        layers = {f"layers.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()}
        return {f"model.{name}.weight": shape for name, shape in (rows | layers).items()}

    def stored_name(self, name: str) -> str:
        return f"model.{name.removeprefix('transformer.').removeprefix('lm_')}"


# ---- what works with it ----


@pytest.fixture
def toy(request: pytest.FixtureRequest, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(ARCHITECTURES, "toy", Toy)
    monkeypatch.setitem(LAYOUTS, "toy", ToyLayout())
    monkeypatch.setattr(ARCH, "metadata", {**ARCH.metadata, "choices": ("gpt2", "qwen3", "toy")})
    monkeypatch.chdir(tiny)
    arch = getattr(request, "param", "toy")
    return tiny_config(tiny, model={"arch": arch, "tie_weights": False}, data={"document_mask": True})


def test_what_the_config_accepts_has_a_model_and_a_layout() -> None:
    """If this fails: `model.arch` in pipeline/config/keys.py, ARCHITECTURES and LAYOUTS must list the same architectures."""
    assert set(ARCH.metadata["choices"]) == ARCHITECTURES.keys() == LAYOUTS.keys()


@pytest.mark.parametrize(("toy", "tie_weights"), [("toy", True), ("toy", False), ("qwen3", False)], indirect=["toy"])
def test_it_trains_and_resumes_bit_for_bit(toy: Config, tie_weights: bool) -> None:
    straight = replace(toy, model=replace(toy.model, tie_weights=tie_weights))
    assert run(straight) == ""
    halves = renamed(straight, "halves")
    # The schedule is that of ten steps, also where the run ends after five.
    schedule = replace(halves.schedule, decay_steps=10)
    run(replace(halves, train=replace(halves.train, max_steps=5), schedule=schedule))
    run(halves)
    assert_identical(halves, straight)


def test_it_samples_evaluates_and_opens_as_a_folder_of_its_own_kind(
    toy: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run(toy)
    folder = toy.run_dir / "checkpoints" / "step_00000010"
    model, tokenizer = load_model(folder)
    prompt = tokenizer.encode("ABC").tolist()
    steps = generate(Decoder(model, 2), prompt, max_new_tokens=10, choice=Choice(temperature=0), seed=0)
    decoded = prompt + [tokens.ids[0] for tokens in steps]
    with torch.inference_mode():
        assert model.logits(torch.tensor([decoded[:-1]]))[0, 2:].argmax(dim=1).tolist() == decoded[3:]
    evaluate(EvalOptions(ckpt=str(folder), json=True))
    report = orjson.loads(capsys.readouterr().out)
    described = describe_model(folder)
    assert report["loss"] == pytest.approx(described["val_loss"], rel=0.2)
    block = 2 * 32 * 32 + 2 * 32 * 16 + 32
    assert described["parameters"] == 2 * 257 * 32 + 2 * block
    (folder / "checkpoint.json").unlink()
    again, _ = load_model(folder)
    assert again.config == replace(toy.model, block_size=16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
