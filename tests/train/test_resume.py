"""Which checkpoint a start goes on from: damage is seen, named and stepped over, and never ends in a fresh start."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_config, write_dataset
from test_train_run import assert_identical, copy_of, curve, renamed, rows, status

from pipeline.checkpoint.folder import read_description
from pipeline.checkpoint.pointers import checkpoint_folders, pointed_folder
from pipeline.config.keys import Config
from pipeline.config.load import to_dict
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.runs import RunFolder
from train import resume
from train.run import run

FILES = (
    "checkpoint.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "training_state.safetensors",
)  # fmt: skip
Damage = Callable[[Path], None]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bit_flipped(path: Path, position: int | None = None, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


def of_another_step(path: Path) -> None:
    shutil.copyfile(path.parent.with_name("step_00000005") / path.name, path)


DAMAGES: tuple[Damage, ...] = (truncated, bit_flipped, missing, of_another_step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of ten steps with checkpoints at 5 and 10. Copy it before you break it."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "data" / "tiny")
    config = tiny_config(folder, model={"dropout": 0.1})
    run(config)
    assert sorted(path.name for path in (config.run_dir / "checkpoints" / "step_00000010").iterdir()) == list(FILES)
    return config


def start_point(config: Config, how: str = "auto") -> Path | None:
    config = replace(config, checkpoint=replace(config.checkpoint, resume=how))
    start = resume.start_point(config, Mixture(config), dry_run=False)
    return start and start.folder


def spoil(config: Config, file: str, damage: Damage) -> bool:
    """Damage the newest checkpoint; False where its file was the same at the other step, so that nothing changed."""
    path = config.run_dir / "checkpoints" / "step_00000010" / file
    before = path.read_bytes()
    damage(path)
    return not path.exists() or path.read_bytes() != before


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    finished: Config, file: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    config = copy_of(finished, "damaged")
    if not spoil(config, file, damage):
        assert file in ("config.json", "tokenizer.json", "tokenizer_config.json") and damage is of_another_step
        return
    checkpoints = config.run_dir / "checkpoints"
    with pytest.raises(UserError, match="step_00000010"):
        start_point(config, "step_00000010")
    assert (checkpoints / "step_00000010").is_dir(), "what was named stays where it is"
    assert start_point(config) == checkpoints / "step_00000005"
    line = next(record.message for record in caplog.records if "damaged_step_00000010" in record.message)
    assert file in line and "\n" not in line
    assert (checkpoints / "damaged_step_00000010").is_dir() and not (checkpoints / "step_00000010").exists()
    assert not (checkpoints / "best").exists(), "it named the damaged one"


@pytest.mark.campaign
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_with_a_damaged_checkpoint_ends_as_if_nothing_had_been(
    finished: Config, file: str, damage: Damage
) -> None:
    config = copy_of(finished, "repaired")
    if spoil(config, file, damage):
        with pytest.raises(UserError):
            run(replace(config, checkpoint=replace(config.checkpoint, resume="step_00000010")))
        run(config)
        assert status(config)["state"] == "done"
    assert_identical(config, finished)


@pytest.mark.campaign
@pytest.mark.parametrize("file", FILES)
def test_no_flipped_bit_goes_unseen(finished: Config, file: str) -> None:
    config = copy_of(finished, "flipped")
    path = config.run_dir / "checkpoints" / "step_00000010" / file
    whole, source = path.read_bytes(), random.Random(0)
    for _ in range(200):
        bit_flipped(path, source.randrange(len(whole)), source.randrange(8))
        with pytest.raises(UserError):
            start_point(config, "step_00000010")
        path.write_bytes(whole)
    assert start_point(config, "step_00000010") == path.parent


def test_a_run_whose_earlier_version_skipped_samples_is_refused(finished: Config) -> None:
    config = copy_of(finished, "skipped")
    (config.run_dir / "skipped_samples.jsonl").write_text('{"from_step": 7, "samples": 8}\n')
    with pytest.raises(UserError, match="skipped_samples.jsonl lists samples that an earlier version"):
        start_point(config)
    (config.run_dir / "skipped_samples.jsonl").unlink()
    assert start_point(config) == config.run_dir / "checkpoints" / "step_00000010"


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(finished: Config) -> None:
    config = copy_of(finished, "again")
    spoil(config, "model.safetensors", truncated)
    run(config)
    assert_identical(config, finished)
    assert pointed_folder(config.run_dir / "checkpoints", "best") == config.run_dir / "checkpoints" / "step_00000010"


def test_where_none_can_be_used_everything_stays_and_nothing_starts_anew(finished: Config) -> None:
    config = copy_of(finished, "hopeless")
    checkpoints = config.run_dir / "checkpoints"
    spoil(config, "model.safetensors", missing)
    truncated(checkpoints / "step_00000005" / "checkpoint.json")
    with pytest.raises(UserError, match=r"model.safetensors is missing.*; nor can step_00000005 be used"):
        run(config)
    assert [folder.name for folder in checkpoint_folders(checkpoints)] == ["step_00000005", "step_00000010"]
    assert curve(config) == curve(finished)


def test_a_checkpoint_of_another_config_is_set_aside(finished: Config, caplog: pytest.LogCaptureFixture) -> None:
    other = renamed(finished, "other")
    other = replace(other, run=replace(other.run, seed=1))
    run(other)
    config = copy_of(finished, "mixed")
    foreign = config.run_dir / "checkpoints" / "step_00000010"
    shutil.rmtree(foreign)
    shutil.copytree(other.run_dir / "checkpoints" / "step_00000010", foreign)
    run(config)
    assert "cannot resume with run.seed 1 -> 1337" in caplog.text
    assert_identical(config, finished)


@pytest.mark.parametrize(("arch", "n_inner"), [("gpt2", 4 * 32), ("qwen3", 128)])
def test_a_width_that_is_written_out_is_no_change(finished: Config, arch: str, n_inner: int) -> None:
    model = replace(finished.model, arch=arch, n_embd=32, n_head=2)
    config = replace(finished, model=model)
    saved = read_description(finished.run_dir / "checkpoints/step_00000010")
    saved = replace(saved, config=to_dict(config))
    written = replace(model, n_kv_head=2, head_dim=16, n_inner=n_inner)
    assert model.n_kv_head == model.head_dim == model.n_inner == 0
    assert resume.changes(saved, replace(config, model=written)) == {}
    other = replace(written, n_layer=model.n_layer + 1)
    assert list(resume.changes(saved, replace(config, model=other))) == ["model.n_layer"]
    if arch == "qwen3":
        assert list(resume.changes(saved, replace(config, model=replace(written, n_kv_head=1)))) == ["model.n_kv_head"]


def test_dry_run_says_what_it_would_set_aside_and_leaves_it(finished: Config, caplog: pytest.LogCaptureFixture) -> None:
    config = copy_of(finished, "dry")
    spoil(config, "model.safetensors", bit_flipped)
    run(config, dry_run=True)
    assert "model.safetensors does not match its hash" in caplog.text
    assert (config.run_dir / "checkpoints" / "step_00000010").is_dir()


def test_resume_by_name_goes_back_and_comes_to_the_same_end(finished: Config) -> None:
    config = copy_of(finished, "back")
    named = replace(config, checkpoint=replace(config.checkpoint, resume="step_00000005"))
    run(named)
    assert_identical(config, finished)
    assert (config.run_dir / "checkpoints" / "left_behind_step_00000010").is_dir()
    absent = replace(config, checkpoint=replace(config.checkpoint, resume="step_00000007"))
    with pytest.raises(UserError, match=r"step_00000007: checkpoint.resume names it; found: step_0.*05, step_0.*10"):
        run(absent)


def test_starts_and_saves_are_recorded_and_those_past_a_resumed_step_dropped(finished: Config) -> None:
    config = copy_of(finished, "events")

    def events() -> list[tuple[str, int]]:
        found = map(json.loads, (config.run_dir / "events.jsonl").read_text().splitlines())
        return [(row["event"], row["step"]) for row in found]

    assert events() == [("start", 0), ("save", 5), ("save", 10)]
    run(replace(config, checkpoint=replace(config.checkpoint, resume="step_00000005")))
    assert events() == [("start", 0), ("save", 5), ("start", 5), ("save", 10)]


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b"../elsewhere", b"step_00000011\n"])
def test_a_lost_or_spoilt_pointer_leads_to_the_newest(finished: Config, content: bytes | None) -> None:
    config = copy_of(finished, "pointerless")
    pointer = config.run_dir / "checkpoints" / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert start_point(config) == config.run_dir / "checkpoints" / "step_00000010"


def test_a_pointer_to_nothing_is_never_a_fresh_start(finished: Config) -> None:
    config = copy_of(finished, "emptied")
    for folder in checkpoint_folders(config.run_dir / "checkpoints"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="latest names step 10, but no checkpoint up to that step exists"):
        run(config)
    assert len(rows(config)) == 10


def test_folders_set_aside_twice_keep_their_content(finished: Config) -> None:
    config = copy_of(finished, "twice")
    checkpoints = config.run_dir / "checkpoints"
    for _ in range(2):
        spoil(config, "model.safetensors", truncated)
        run(config)
    assert {path.name for path in checkpoints.glob("damaged_*")} == {
        "damaged_step_00000010", "damaged_step_00000010_2"
    }  # fmt: skip


def test_rows_past_a_step_and_truncated_ones_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    # After a power failure a file may end with blocks that were never written, or with another's.
    folder.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st\0\0\xff\xfe')
    folder.bad_steps.write_text('{"step": 1}\n{"step": 2}\n')
    resume.drop_rows_after(folder, 2)
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert folder.bad_steps.read_text() == '{"step": 1}\n', "step 2 had not been taken yet"
