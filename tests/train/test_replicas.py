"""Ranks whose weights part are found, and named."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, overrides, run_program, tiny_config

from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from train.checks.replicas import check_replicas, parameter_hashes
from train.run import run

SMALL = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)


class Told(World):
    """Rank 0 of as many as there are `models`: what it gathers is what those would say."""

    models: list[LanguageModel]

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [parameter_hashes(model) for model in self.models]
        if isinstance(value, int):
            return [hash(tuple(parameter_hashes(model).values())) for model in self.models]
        return [value] * self.size


def world_of(models: list[LanguageModel]) -> Told:
    world = Told(rank=0, size=len(models), local_size=len(models), device=torch.device("cpu"))
    object.__setattr__(world, "models", models)
    return world


def model_of(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(SMALL, 257)


def test_equal_weights_pass_and_one_flipped_bit_does_not() -> None:
    models = [model_of() for _ in range(3)]
    check_replicas(models[0], world_of(models), step=7)
    weight = models[2].transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(
        UserError, match=r"at step 7 the weights of rank\(s\) 2 of 3 differ .* transformer.h.0.mlp.c_fc.weight"
    ):
        check_replicas(models[0], world_of(models), step=7)


def test_the_odd_ones_out_are_named_also_where_rank_0_is_one() -> None:
    models = [model_of(1), model_of(), model_of()]
    with pytest.raises(UserError, match=r"rank\(s\) 0 of 3"):
        check_replicas(models[0], world_of(models), step=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "every", "message"),
    [("{0}", 0, "at step 0"), pytest.param("{3}", 2, "at step 4", marks=pytest.mark.campaign)],
)
def test_a_rank_that_strays_ends_the_run_with_one_line(tiny: Path, steps: str, every: int, message: str) -> None:
    """Rank 1 changes one weight at the start, which is always checked, or after step 3, a step before a check."""
    (tiny / "sitecustomize.py").write_text(
        "import os, sys, torch\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import train.run, train.trainer\n"
        "    initialise, step = train.run.initialise, train.trainer.Trainer.train_step\n"
        "    def stray(trainer):\n"
        f"        if trainer.step in {steps}:\n"
        "            with torch.no_grad(): trainer.model.transformer.ln_f.weight[0] += 1e-6\n"
        "    def initialised(trainer, start):\n"
        "        initialise(trainer, start)\n"
        "        stray(trainer)\n"
        "    def stepped(trainer):\n"
        "        result = step(trainer)\n"
        "        stray(trainer)\n"
        "        return result\n"
        "    train.run.initialise, train.trainer.Trainer.train_step = initialised, stepped\n"
    )
    config = tiny_config(tiny, parallel={"check_every_steps": every})
    result: subprocess.CompletedProcess[str] = run_program(
        "train", "quickstart", *overrides(config), cwd=tiny, ranks=2, PYTHONPATH=f"{tiny}:{ROOT}"
    )
    assert result.returncode != 0
    assert result.stderr.count("differ from the others', first in transformer.ln_f.weight") == 1, result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(("every", "checked"), [(0, []), (4, [4, 8])])
def test_weights_are_checked_at_the_start_and_as_often_as_the_config_says(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, every: int, checked: list[int]
) -> None:
    seen: list[int] = []
    for module in ("train.run", "train.trainer"):
        monkeypatch.setattr(f"{module}.check_replicas", lambda model, world, step: seen.append(step))
    run(tiny_config(tiny, parallel={"check_every_steps": every}))
    assert seen == [0, *checked]
