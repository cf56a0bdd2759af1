"""The arithmetic of a run against the model itself, and against figures from the literature."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_dataset

from pipeline.budget import (
    accumulation_steps,
    checkpoint_bytes,
    data_arithmetic,
    flops_per_token,
    most_checkpoints,
    nearest_batch,
    newton_schulz_flops,
    outlook,
    parameters,
    step_arithmetic,
)
from pipeline.config.keys import Config, ModelConfig, OptimizerConfig
from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from pipeline.model.language_model import LanguageModel


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_parameters_are_those_of_the_model(bias: bool, tie_weights: bool) -> None:
    config = ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, bias=bias, tie_weights=tie_weights)
    with torch.device("meta"):
        model = LanguageModel(config, 257)
    padding = (1 if tie_weights else 2) * (model.padded_vocab_size - 257) * 32
    assert parameters(config, 257) == sum(p.numel() for p in model.parameters()) - padding


def test_gpt2_124m() -> None:
    """6 N + 12 L C T (Chowdhery et al. 2022, appendix B) with N = 124,439,808 less the position embeddings."""
    assert parameters(ModelConfig(), 50257) == 124_439_808
    assert flops_per_token(ModelConfig(), 50257) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert checkpoint_bytes(Config(), 50257) == 12 * 124_439_808
    muon = Config(optimizer=OptimizerConfig(name="muon"))
    assert checkpoint_bytes(muon, 50257) == 12 * 124_439_808 - 4 * 12 * 12 * 768**2
    assert newton_schulz_flops(muon) == 12 * 5 * 768**3 * (2 * (4 * 4 + 2) + (4 * 3 + 2) + (4 + 2))
    assert newton_schulz_flops(Config()) == 0
    untied = replace(ModelConfig(), tie_weights=False)
    assert flops_per_token(untied, 50257) == flops_per_token(ModelConfig(), 50257), "a lookup takes no FLOPs"


def test_a_batch_that_does_not_divide_is_refused_with_what_does(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"tokens_per_step": 96, "micro_batch_size": 2})
    assert accumulation_steps(config, 1) == 3
    with pytest.raises(
        UserError, match=r"x 2 rank\(s\) = 64 tokens; set train.tokens_per_step=64 or 128, or .*size=1 or 3"
    ):
        accumulation_steps(config, 2)


def test_every_factor_is_printed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"max_steps": 20})
    assert step_arithmetic(config, 2) == (
        "tokens_per_step 128 = micro_batch_size 2 x block_size 16 x accumulation 2 x 2 rank(s)"
    )
    manifest = load_manifest(write_dataset(tmp_path, train_tokens=500))
    # 48 of 160 windows; one epoch has 500 // 16 - 1 = 30 of them.
    assert data_arithmetic(config, Path("data/tiny"), manifest, 0.3) == (
        "data data/tiny (30.00% of the samples): 500 train tokens; 20 steps take 768 tokens, 1.60 epoch(s)"
    )


@pytest.mark.parametrize(("every", "most"), [(0, 5), (3, 8), (100, 5)])
def test_permanent_checkpoints_take_room_too(tmp_path: Path, every: int, most: int) -> None:
    assert most_checkpoints(tiny_config(tmp_path, checkpoint={"keep_every_steps": every})) == most


def test_the_short_form_names_memory_and_time_where_the_device_is_known(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    memory, duration = outlook(config, 257, "NVIDIA H100 80GB HBM3", 2)
    assert memory.startswith("memory a rank: about 0.00 GB of 80 GB (weights") and "on h100x2, assumed" in duration
    (unknown,) = outlook(config, 257, "gfx90a", 2)
    assert "unknown for gfx90a" in unknown and "--on KINDx2" in unknown
    large = replace(config, model=ModelConfig(n_layer=96, n_embd=12288, n_head=96, block_size=16))
    assert "does not fit h100" in outlook(large, 50257, "h100", 2)[1]


@pytest.mark.parametrize(
    ("ranks", "tokens", "size"), [(1, 128, 2), (3, 96, 2), (2, 128, 2), (8, 128, 1), (16, 256, 1), (1000, 16000, 1)]
)
def test_the_nearest_batch_divides(tmp_path: Path, ranks: int, tokens: int, size: int) -> None:
    found = nearest_batch(tiny_config(tmp_path), ranks)
    assert (found.train.tokens_per_step, found.train.micro_batch_size) == (tokens, size)
    accumulation_steps(found, ranks)
