"""The guard against spikes: bad batches injected, the run goes back, leaves their samples out, and stays exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_train_run import assert_identical, curve, final_tensors, renamed, rows

from pipeline.config.keys import Config
from pipeline.errors import Diverged, UserError
from train.run import run
from train.spikes import SkippedSamples, SpikeGuard
from train.trainer import Trainer

BAD_SAMPLES = {100, 101, 230}  # in the batches of steps 12 and, with what the first one skips, later


def spiky_config(folder: Path, **sections: dict[str, Any]) -> Config:
    train = {"max_steps": 40, "spike_z_score": 8.0, "spike_window": 8} | sections.pop("train", {})
    return tiny_config(
        folder, train=train, checkpoint={"every_steps": 5, "keep": 2}, eval={"every_steps": 0}, model={"dropout": 0.1},
        **sections,
    )  # fmt: skip


@pytest.fixture
def bad_batches(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Micro-batches that hold one of these samples have a loss, and so a gradient, a thousand times too large."""
    bad = set(BAD_SAMPLES)
    real = Trainer.micro_batch

    def micro_batch(self: Trainer, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.config.train.micro_batch_size
        first = self.first_sample + (turn * self.world.size + self.world.rank) * size
        self.model.scale = 1000.0 if bad & set(range(first, first + size)) else 1.0  # type: ignore[assignment]
        return real(self, turn)

    def scaled(self: Trainer, *arguments: Any) -> None:
        initialise(self, *arguments)
        self.model.register_forward_hook(lambda module, _, loss: loss * getattr(module, "scale", 1.0))

    initialise = Trainer.__init__
    monkeypatch.setattr(Trainer, "micro_batch", micro_batch)
    monkeypatch.setattr(Trainer, "__init__", scaled)
    return bad


def skipped(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "skipped_samples.jsonl").read_text().splitlines()]


def test_a_spike_sends_the_run_back_past_its_samples(tiny: Path, bad_batches: set[int]) -> None:
    config = spiky_config(tiny)
    run(config)
    first, second = skipped(config)
    # Eight samples a step: sample 100 is of step 12, the last checkpoint was at 10, so steps 10, 11 and 12 are left out.
    assert (first["step"], first["first_sample"], first["samples"], first["spike_at"]) == (10, 80, 24, 12)
    # Sample 230 is now of step (230 - 24) / 8 = 25, with a checkpoint right before it.
    assert (second["step"], second["first_sample"], second["samples"], second["spike_at"]) == (25, 224, 8, 25)
    assert [step for step, *_ in curve(config)] == list(range(1, 41)), "one curve, no step twice"
    assert max(row["grad_norm"] for row in rows(config)) < 100, "no bad batch reached the weights"


@pytest.mark.slow
def test_the_weights_are_those_of_a_run_that_never_had_the_samples(tiny: Path, bad_batches: set[int]) -> None:
    config = spiky_config(tiny)
    run(config)
    twin = renamed(config, "twin")
    twin.run_dir.mkdir(parents=True)
    (twin.run_dir / "skipped_samples.jsonl").write_bytes((config.run_dir / "skipped_samples.jsonl").read_bytes())
    bad_batches.clear()
    run(twin)
    assert_identical(twin, config)


@pytest.mark.slow
def test_stopped_after_every_step_the_guard_does_the_same(
    tiny: Path, bad_batches: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms travel in the checkpoint, and a checkpoint made by a stop is not where a rewind goes."""
    straight = spiky_config(tiny, train={"max_steps": 30})
    run(straight)
    (tiny / "stop").touch()
    monkeypatch.setenv("PIPELINE_STOP_FILE", str(tiny / "stop"))
    chopped = renamed(straight, "chopped")
    for _ in range(40):
        if not run(chopped):
            break
    assert skipped(chopped) == skipped(straight)
    ours, theirs = final_tensors(chopped), final_tensors(straight)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert curve(chopped) == curve(straight)


def test_off_by_default_the_same_batches_do_reach_the_weights(tiny: Path, bad_batches: set[int]) -> None:
    config = spiky_config(tiny, train={"spike_z_score": 0.0})
    run(config)
    assert not (config.run_dir / "skipped_samples.jsonl").exists()
    assert max(row["grad_norm"] for row in rows(config)) > 100


def test_before_the_first_checkpoint_a_spike_is_a_bad_step(tiny: Path, bad_batches: set[int]) -> None:
    config = spiky_config(tiny)
    run(replace(config, checkpoint=replace(config.checkpoint, every_steps=100)))
    written = [json.loads(line) for line in (config.run_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [12, 28]
    assert not (config.run_dir / "skipped_samples.jsonl").exists()


def test_too_many_spikes_after_one_checkpoint_are_a_divergence(tiny: Path, bad_batches: set[int]) -> None:
    bad_batches.update(range(100, 10_000))
    with pytest.raises(Diverged, match="3 spikes of the gradient norm sent the run back to step 10"):
        run(spiky_config(tiny, train={"max_bad_steps": 3}))


def test_the_guard_needs_its_whole_window() -> None:
    guard = SpikeGuard(z_score=3.0, window=4)
    for norm in (1.0, 1.1, 0.9):
        guard.observe(norm)
        assert not guard.is_spike(1e9)
    guard.observe(1.0)
    assert guard.is_spike(2.0) and not guard.is_spike(1.1)
    twin = SpikeGuard(z_score=3.0, window=4)
    twin.restore(guard.norms)
    assert twin.norms == [1.0, 1.1, 0.9, 1.0] and twin.is_spike(2.0)
    off = SpikeGuard(z_score=0.0, window=4)
    off.restore(guard.norms)
    assert off.norms == [] and not off.is_spike(1e9)


def test_damaged_records_of_what_was_skipped_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "skipped_samples.jsonl").write_text('{"step": 3, "samp')
    with pytest.raises(UserError, match="without it the run cannot tell which samples come next"):
        SkippedSamples(tmp_path)
