"""--ckpt average: the mean of a run's newest checkpoints, made when it is asked for, and a model folder as any other."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import die_at, run_program, tiny_config, write_dataset
from safetensors.torch import load_file

import pipeline
from observe import inspect, verify
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import read_description
from pipeline.checkpoint.load import load_model
from pipeline.checkpoint.pointers import pointed_folder
from pipeline.checkpoint.prune import prune_checkpoints
from pipeline.config.keys import Config
from pipeline.errors import UserError
from train.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Ten steps with checkpoints at 2, 4 (kept for good), 6, 8 and 10; the newest three are kept."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "data" / "tiny")
    checkpoint = {"every_steps": 2, "keep_every_steps": 4}
    config = tiny_config(folder, checkpoint=checkpoint, model={"bias": False}, optimizer={"name": "muon"})
    run(config)
    return config


@pytest.fixture
def config(finished: Config, tmp_path: Path) -> Config:
    """A run of its own."""
    moved = replace(finished, run=replace(finished.run, dir=str(tmp_path / "runs")))
    shutil.copytree(finished.run_dir, moved.run_dir)
    return moved


def assert_is_mean(config: Config, *steps: int) -> None:
    folders = [config.run_dir / "checkpoints" / f"step_{step:08d}" for step in steps]
    weights, found = (
        [load_file(folder / "model.safetensors") for folder in folders],
        load_file(config.run_dir / "checkpoints/average/model.safetensors"),
    )
    assert found.keys() == weights[0].keys()
    for name, tensor in found.items():
        expected = torch.stack([each[name].double() for each in weights]).mean(dim=0)
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=0, msg=name)
    averaged = {folder.name: read_description(folder).hash for folder in folders}
    assert read_description(config.run_dir / "checkpoints/average").averaged == averaged


def test_it_is_the_mean_of_the_newest_checkpoints_and_a_folder_as_any_other(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = config.run_dir / "checkpoints"
    before = {pointer: pointed_folder(checkpoints, pointer) for pointer in ("latest", "best")}
    folder = find_checkpoint("average", config.run_dir)
    assert folder == checkpoints / "average"
    assert_is_mean(config, 6, 8, 10)
    assert not (folder / "training_state.safetensors").exists()
    assert {path.name for path in checkpoints.glob(".*")} == {".average.lock"}
    verify.run(folder)
    inspect.run(folder, as_json=True)
    verdict, described = capsys.readouterr().out.splitlines()
    assert verdict.startswith(f"verified: {folder}: step 10,")
    assert list(json.loads(described)["averaged"]) == ["step_00000006", "step_00000008", "step_00000010"]
    text = pipeline.load("average", run_dir=config.run_dir, device="cpu").generate("AB", max_new_tokens=3, seed=1)
    assert text == pipeline.load(folder, device="cpu").generate("AB", max_new_tokens=3, seed=1)
    assert {pointer: pointed_folder(checkpoints, pointer) for pointer in before} == before
    prune_checkpoints(checkpoints, keep=1)
    assert folder.is_dir() and load_model(folder)
    with pytest.raises(UserError, match="fault|damaged"):
        (folder / "model.safetensors").write_bytes(b"")
        verify.run(folder)


def test_it_is_made_once_and_again_where_there_are_newer_ones(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    folder = find_checkpoint("average", config.run_dir)
    inode = folder.stat().st_ino
    assert find_checkpoint("average", config.run_dir).stat().st_ino == inode
    run(replace(config, train=replace(config.train, max_steps=12)))
    assert folder.stat().st_ino == inode, "training takes no notice of it"
    caplog.set_level("INFO", "pipeline")
    assert find_checkpoint("average", config.run_dir).stat().st_ino != inode
    assert "averaged step_00000008, step_00000010, step_00000012 into" in caplog.text
    assert_is_mean(config, 8, 10, 12)
    assert {path.name for path in folder.parent.glob(".*")} == {".average.lock"}


def test_training_never_resumes_from_it(config: Config) -> None:
    find_checkpoint("average", config.run_dir)
    for folder in (config.run_dir / "checkpoints").glob("step_*"):
        shutil.rmtree(folder)
    for pointer in ("latest", "best"):
        (config.run_dir / "checkpoints" / pointer).unlink()
    with pytest.raises(UserError, match="nothing to resume"):
        run(replace(config, checkpoint=replace(config.checkpoint, resume="must")))
    branch = replace(config.run, name="branch", branch_from=str(config.run_dir / "checkpoints" / "average"))
    longer = replace(config.train, max_steps=12)
    with pytest.raises(UserError, match=r"has no training_state.safetensors: start from its weights alone"):
        run(replace(config, run=branch, train=longer))


@pytest.mark.slow
def test_what_cannot_be_averaged_is_one_line(config: Config) -> None:
    checkpoints = config.run_dir / "checkpoints"
    prune_checkpoints(checkpoints, keep=1)
    (checkpoints / "best").unlink()
    result = run_program("sample", "--ckpt", "average", "--run-dir", str(config.run_dir), cwd=config.run_dir)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "expected 2 or more: checkpoint.keep=3 newest ones are averaged, written every" in result.stderr
    shutil.rmtree(checkpoints)
    with pytest.raises(UserError, match="no checkpoint average in"):
        find_checkpoint("average", config.run_dir)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_one_line_unless_it_has_its_average(config: Config) -> None:
    checkpoints = config.run_dir / "checkpoints"
    checkpoints.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to .*checkpoints: Permission denied"):
        find_checkpoint("average", config.run_dir)
    checkpoints.chmod(0o700)
    find_checkpoint("average", config.run_dir)
    checkpoints.chmod(0o500)
    find_checkpoint("average", config.run_dir)
    checkpoints.chmod(0o700)


@pytest.mark.slow
def test_it_may_be_killed_at_any_moment(config: Config) -> None:
    """The folder of before, or of now, or none: never half of one; the same command then makes it."""
    find_checkpoint("average", config.run_dir)
    run(replace(config, train=replace(config.train, max_steps=12)))
    folder, old = config.run_dir / "checkpoints" / "average", config.run_dir / "average"
    shutil.copytree(folder, old)
    for operation in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        survived = die_at(operation, lambda: find_checkpoint("average", config.run_dir))
        if folder.is_dir():
            verify.run(folder)
        find_checkpoint("average", config.run_dir)
        assert_is_mean(config, 8, 10, 12)
        # What was replaced stays where the kill came after that, until the next one is made.
        left = {path.name for path in folder.parent.glob(".*")} - {".average.lock", ".average.replaced.partial"}
        assert not left
        if survived:
            break
    assert operation > 5
