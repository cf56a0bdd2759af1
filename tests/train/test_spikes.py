"""The guard against spikes: bad batches are injected, their steps skipped, and the run stays exact across restarts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_train_run import curve, final_tensors, renamed, rows

from pipeline.config.keys import Config, TrainConfig
from pipeline.errors import Diverged
from train.run import run
from train.spikes import Outcome, StepGuard
from train.trainer import Trainer

BAD_SAMPLES = {100, 101, 230}  # of eight samples a step, in the batches of steps 12 and 28


def spiky_config(folder: Path, **sections: dict[str, Any]) -> Config:
    train = {"max_steps": 30, "spike_z_score": 8.0, "spike_window": 8} | sections.pop("train", {})
    return tiny_config(
        folder, train=train, checkpoint={"every_steps": 5, "keep": 2}, eval={"every_steps": 0}, model={"dropout": 0.1},
        **sections,
    )  # fmt: skip


@pytest.fixture
def bad_batches(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Micro-batches that hold one of these samples have a loss, and so a gradient, a thousand times too large."""
    bad = set(BAD_SAMPLES)
    real = Trainer.micro_batch

    def micro_batch(self: Trainer, number: int) -> torch.Tensor:
        size = self.config.train.micro_batch_size
        first = self.first_sample + (number * self.world.size + self.world.rank) * size
        self.model.scale = 1000.0 if bad & set(range(first, first + size)) else 1.0  # type: ignore[assignment]
        return real(self, number)

    def scaled(self: Trainer, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        self.model.register_forward_hook(lambda module, _, loss: loss * getattr(module, "scale", 1.0))

    initialise = Trainer.__init__
    monkeypatch.setattr(Trainer, "micro_batch", micro_batch)
    monkeypatch.setattr(Trainer, "__init__", scaled)
    return bad


def bad_steps(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_spike_is_skipped_also_when_stopped_after_every_step(
    tiny: Path, bad_batches: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms that the guard compares with are saved in the checkpoint."""
    straight = spiky_config(tiny)
    run(straight)
    skipped = bad_steps(straight)
    assert [(row["step"], row["first_sample"], row["samples"]) for row in skipped] == [(12, 96, 8), (28, 224, 8)]
    assert {row["reason"] for row in skipped} == {"spike"} and all(float(row["grad_norm"]) > 100 for row in skipped)
    assert [step for step, *_ in curve(straight)] == list(range(1, 31))
    later = [row["grad_norm"] for row in rows(straight) if row["step"] not in (13, 29)]
    assert max(later) < 100, "no bad batch reached the weights"

    (tiny / "stop").touch()
    monkeypatch.setenv("PIPELINE_STOP_FILE", str(tiny / "stop"))
    chopped = renamed(straight, "chopped")
    while run(chopped):
        pass
    assert bad_steps(chopped) == skipped
    ours, theirs = final_tensors(chopped), final_tensors(straight)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert curve(chopped) == curve(straight)


def test_off_by_default_the_same_batches_do_reach_the_weights(tiny: Path, bad_batches: set[int]) -> None:
    config = spiky_config(tiny, train={"spike_z_score": 0.0})
    run(config)
    assert not (config.run_dir / "bad_steps.jsonl").exists()
    assert max(row["grad_norm"] for row in rows(config)) > 100


def test_too_many_spikes_in_a_row_are_a_divergence(tiny: Path, bad_batches: set[int]) -> None:
    bad_batches.update(range(100, 10_000))
    with pytest.raises(
        Diverged, match="3 steps in a row, up to step 14, .* or a spike: the weights of step 12 were kept"
    ):
        run(spiky_config(tiny, train={"max_bad_steps": 3}))


def test_the_guard_needs_its_whole_window() -> None:
    guard = StepGuard(TrainConfig(spike_z_score=3.0, spike_window=4))
    for norm in (1.0, 1.1, 0.9, 1.0):
        assert guard.judge(2.0, norm) is Outcome.TAKEN
    twin = StepGuard(TrainConfig(spike_z_score=3.0, spike_window=4))
    twin.restore(guard.norms, guard.bad_steps)
    for each in (guard, twin):
        assert each.judge(2.0, 2.0) is Outcome.SPIKE and each.judge(float("nan"), 1.0) is Outcome.NOT_FINITE
        assert each.bad_steps == 2 and each.norms == [1.0, 1.1, 0.9, 1.0], "what was skipped is not compared with"
        assert each.judge(2.0, 1.1) is Outcome.TAKEN and each.bad_steps == 0


def test_without_a_z_score_only_what_is_not_finite_is_skipped() -> None:
    guard = StepGuard(TrainConfig(spike_window=2))
    guard.restore([1.0, 1.0], 0)
    assert guard.judge(2.0, 1e9) is Outcome.TAKEN and guard.norms == []
    assert guard.judge(2.0, float("inf")) is Outcome.NOT_FINITE


def test_the_device_decides_as_the_host_does() -> None:
    """On a GPU the update is decided before the host has seen the norm: both have to agree, also at the very bound."""
    guard = StepGuard(TrainConfig(spike_z_score=3.0, spike_window=8))
    norms = torch.rand(8, generator=torch.Generator().manual_seed(5)).tolist()
    for norm in norms:
        guard.judge(1.0, norm)
    bound = torch.tensor(guard.most_norm)
    assert bound.item() == guard.most_norm
    assert bound.item() == pytest.approx(np.mean(norms) + 3 * np.std(norms))
    infinity, nan = torch.tensor(math.inf), torch.tensor(math.nan)
    one = torch.ones(())
    for loss, norm in [
        (one, bound), (one, bound.nextafter(infinity)), (one, bound.nextafter(-infinity)), (one, infinity), (one, nan),
        (nan, one), (infinity, one), (-infinity, one),
    ]:  # fmt: skip
        other = StepGuard(TrainConfig(spike_z_score=3.0, spike_window=8))
        other.restore(guard.norms, 0)
        taken = other.judge(loss.item(), norm.item()) is Outcome.TAKEN
        assert guard.rejects(loss, norm).item() is not taken, (loss, norm)
