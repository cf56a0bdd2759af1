"""Saving beside training: the copy is of one moment, one save is in flight at most, and a failure is loud."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config
from test_train_run import rows, status
from test_trainer import trainer_of

from pipeline.checkpoint.folder import State, read_description, verify_files, write_checkpoint
from pipeline.checkpoint.pointers import checkpoint_folders, pointed_folder, step_of
from pipeline.config.keys import Config
from pipeline.errors import UserError
from train.metrics.record import Metrics
from train.run import run
from train.saving import Saver
from train.stop import StopRequest


def test_training_goes_on_while_the_checkpoint_of_that_moment_is_written(tiny: Path) -> None:
    """The writing thread is held until training has changed every weight."""
    trainer = trainer_of(tiny_config(tiny))
    trainer.train_step()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moved_on, written = threading.Event(), []

    def write(state: State) -> Path:
        assert moved_on.wait(60)
        written.append({name: tensor.clone() for name, tensor in state.weights.items()})
        return tiny

    saver = trainer.checkpoints.saver
    saver.start(State.of(trainer.model, trainer.optimizer), write)
    assert saver.busy
    trainer.train_step()
    moved_on.set()
    saver.wait()
    assert not saver.busy and not saver.failed
    assert all(torch.equal(written[0][name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    saver.close()


def test_at_most_one_save_is_in_flight() -> None:
    saver, state = Saver(), State({"w": torch.zeros(3)}, {})
    running, release = [], threading.Event()

    def write(state: State) -> Path:
        running.append("begun")
        assert release.wait(60)
        running.append("ended")
        return Path()

    saver.start(state, write)
    second = threading.Thread(target=saver.start, args=(state, write))
    second.start()
    second.join(0.05)
    assert second.is_alive(), "the second waits for the first"
    release.set()
    second.join()
    saver.close()
    assert running == ["begun", "ended"] * 2


def test_the_copies_use_the_same_memory_again() -> None:
    saver, state, seen = Saver(), State({"w": torch.ones(3)}, {}), []

    def write(state: State) -> Path:
        seen.append(state.weights["w"].data_ptr())
        return Path()

    saver.reserve(state)
    for _ in range(2):
        saver.start(state, write)
    saver.close()
    assert seen[0] == seen[1] != state.weights["w"].data_ptr()


def test_a_failed_save_ends_training_at_the_next_step_and_says_why(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tiny, train={"max_steps": 1000}, checkpoint={"every_steps": 3}, eval={"every_steps": 0})
    real = write_checkpoint

    def full_disk(checkpoints: Path, state: State, *others: object, **options: object) -> Path:
        if checkpoint_folders(checkpoints):
            raise OSError(28, "No space left on device")
        return real(checkpoints, state, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("train.saving.write_checkpoint", full_disk)
    with pytest.raises(UserError, match=r"could not be written, the one before is intact: No space left on device"):
        run(config)
    assert status(config)["state"] == "failed" and 6 <= status(config)["step"] < 1000
    latest = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert latest is not None and latest.name == "step_00000003"


def test_a_failure_of_the_last_save_is_no_success(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.saving.write_checkpoint", full_disk)
    config = tiny_config(tiny, checkpoint={"every_steps": 100})
    with pytest.raises(UserError, match="No space left"):
        run(config)
    assert status(config)["state"] == "failed"


def test_the_stall_is_reported(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    run(tiny_config(tiny))
    lines = [line for line in caplog.messages if line.startswith("saved")]
    assert len(lines) == 2 and all("; training waited" in line for line in lines)


def test_a_run_that_is_done_has_its_last_checkpoint_whole(tiny: Path) -> None:
    config = tiny_config(tiny)
    run(config)
    folder = config.run_dir / "checkpoints" / "step_00000010"
    verify_files(folder, read_description(folder))
    assert not list((config.run_dir / "checkpoints").glob(".*"))


def saved_steps(config: Config) -> list[int]:
    return [step_of(folder) for folder in checkpoint_folders(config.run_dir / "checkpoints")]


def test_save_now_saves_once_and_is_removed(tiny: Path) -> None:
    config = tiny_config(tiny, checkpoint={"every_steps": 10, "keep": 10}, eval={"every_steps": 0})
    trainer = trainer_of(config)
    trainer.checkpoints.run.save_now.touch()
    assert trainer.fit(Metrics(), StopRequest()) == ""
    asked_for, last = saved_steps(config)  # the first waits until the thread has got its memory
    assert asked_for < last == 10
    assert not trainer.checkpoints.run.save_now.exists()


def test_a_folder_named_save_now_asks_for_nothing(tiny: Path) -> None:
    config = tiny_config(tiny, checkpoint={"every_steps": 10, "keep": 10}, eval={"every_steps": 0})
    trainer = trainer_of(config)
    trainer.checkpoints.run.save_now.mkdir(parents=True)
    assert trainer.fit(Metrics(), StopRequest()) == ""
    assert saved_steps(config) == [10] and trainer.checkpoints.run.save_now.is_dir()


def test_a_planned_save_answers_save_now_too(tiny: Path) -> None:
    config = tiny_config(tiny, checkpoint={"every_steps": 1, "keep": 20}, eval={"every_steps": 0})
    trainer = trainer_of(config)
    trainer.checkpoints.run.save_now.touch()
    trainer.fit(Metrics(), StopRequest())
    assert saved_steps(config) == list(range(1, 11))
    assert not trainer.checkpoints.run.save_now.exists()


@pytest.mark.slow
def test_rows_do_not_depend_on_when_it_was_saved(tiny: Path) -> None:
    often, seldom = (
        tiny_config(tiny, run={"name": f"every{n}"}, checkpoint={"every_steps": n}, eval={"every_steps": 0})
        for n in (1, 10)
    )
    run(often)
    run(seldom)
    assert [row["loss"] for row in rows(often)] == [row["loss"] for row in rows(seldom)]


MEASURE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from pipeline.checkpoint.folder import Description, State, write_checkpoint
from pipeline.config.keys import Config, ModelConfig
from pipeline.config.load import to_dict
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from train.optimizer.groups import build_optimizer
from train.saving import Saver

def kilobytes(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])

def peak_bytes_per_parameter(config):
    model, tokenizer = LanguageModel(config.model, 257), ByteTokenizer()
    optimizer = build_optimizer(model, config.optimizer)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    description = Description(step=1, tokens=8, config=to_dict(config), tokenizer=tokenizer.spec(), dataset="")
    saver, folder = Saver(), Path(sys.argv[1])
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    write = lambda state: write_checkpoint(folder, state, model, tokenizer, description=description)
    saver.start(State.of(model, optimizer), write)
    saver.wait()
    saver.close()
    return (kilobytes("VmHWM") - before) * 1024 / sum(p.numel() for p in model.parameters())

config = Config(model=ModelConfig(n_layer=1, n_head=8, n_embd=512, block_size=64))
peak_bytes_per_parameter(config)  # imports
print(peak_bytes_per_parameter(replace(config, model=replace(config.model, n_layer=24))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak of memory")
def test_a_save_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    """Weights and two moments are 12 bytes a parameter; the folder's layout takes no second copy."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert 11 < float(found) <= 12.5, found
