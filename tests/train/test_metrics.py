"""The numbers a run reports: rows that any JSON reader takes, and throughput that adds up."""

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.machine.gpus import PEAK_FLOPS
from pipeline.model.language_model import LanguageModel
from train.metrics import Metrics, Throughput


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.0, "mfu": None})
    metrics.close()
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.0,
        "mfu": None,
    }


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    metrics.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    metrics.close()


def test_throughput_counts_training_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 100.0, 101.0])  # two steps of 2 s and 1 s, an evaluation of 98 s between them
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput(tokens_per_step=600, flops_per_token=1000, peak_flops=1e6)
    for _ in range(2):
        with throughput.timed():
            pass
    assert throughput.tokens_per_s == 1200 / 3
    assert throughput.mfu == pytest.approx(400 * 1000 / 1e6)
    assert throughput.last_step_s == 1.0
    throughput.restart()
    assert throughput.tokens_per_s == 0


def test_mfu_is_unknown_without_a_peak() -> None:
    assert Throughput(1, 1, None).mfu is None


def test_flops_of_gpt2_124m_follow_the_formula() -> None:
    """6 N + 12 L C T (Chowdhery et al. 2022, appendix B) with N = 124,439,808 less the position embeddings."""
    with torch.device("meta"):
        model = LanguageModel(load_config("gpt2-124m", []).model, 50257)
    assert model.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_every_peak_is_found_by_its_own_name_first() -> None:
    names = list(PEAK_FLOPS)
    for position, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:position]), f"{name} is shadowed"
