"""Copies on the node's own disk: whole or absent, checked, and the same run as without them."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ROOT,
    die_at,
    overrides,
    run_program,
    tiny_config,
    tokenizer_named,
    write_dataset,
    write_llm_c,
    write_nanogpt,
    write_shard,
)  # fmt: skip
from safetensors.torch import load_file

from pipeline import files
from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.shards import Manifest, load_manifest
from pipeline.errors import UserError
from pipeline.files import one_writer
from pipeline.machine.ranks import World
from pipeline.vocabulary.specs import from_spec
from train.data import staging
from train.run import run

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def staged(config: Config, into: Path, dry_run: bool = False) -> Mixture:
    return staging.stage(Mixture(config), config, ALONE, into=into, dry_run=dry_run)


def target_of(config: Config, into: Path) -> Path:
    source = Mixture(config).sources[0]
    return into / f"{source.folder.name}-{source.manifest.fingerprint[:12]}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("write", [write_dataset, write_nanogpt, write_llm_c], ids=["ours", "nanoGPT", "llm.c"])
def test_a_copy_has_every_file_and_the_same_fingerprint(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write(tmp_path / "data" / "tiny")
    config = tiny_config(tmp_path)
    wanted = Mixture(config)
    found = staged(config, tmp_path / "local" / "disk")
    assert found.sources[0].folder == target_of(config, tmp_path / "local" / "disk")
    assert found.fingerprint == wanted.fingerprint
    copied = contents(found.sources[0].folder)
    assert copied.pop(".staged").decode() == wanted.fingerprint
    assert copied == contents(tmp_path / "data" / "tiny")
    assert (found.batch(5, 8) == wanted.batch(5, 8)).all()


def test_the_vocabularys_file_comes_along(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    tokenizer = tokenizer_named("word")
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    splits = {split: [write_shard(folder, split, 0, [1, 2, 3] * 100)] for split in ("train", "val")}
    Manifest(tokenizer.spec(), "uint16", splits, [], {}, {}, {}, "test").save(folder)
    source = staged(tiny_config(tmp_path), tmp_path / "local").sources[0]
    shutil.rmtree(folder)
    assert from_spec(source.manifest.tokenizer, source.folder).spec() == tokenizer.spec()


def test_each_dataset_of_a_mixture_has_a_copy(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_dataset(tmp_path / "data" / name, seed=seed)
    config = tiny_config(tmp_path, data={"mixture": [{"dataset": name, "weight": 1} for name in ("a", "b")]})
    found = staged(config, tmp_path / "local")
    assert [source.folder.name[:2] for source in found.sources] == ["a-", "b-"]
    assert found.fingerprint == Mixture(config).fingerprint


# --- a copy that is there ---


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are copied, by name."""
    names: list[str] = []
    real = staging.copy_file

    def counted(source: Path, *rest: Any) -> str:
        names.append(source.name)
        return real(source, *rest)

    monkeypatch.setattr(staging, "copy_file", counted)
    return names


def test_a_whole_copy_is_taken_as_it_is(tiny: Path, copies: list[str]) -> None:
    config = tiny_config(tiny)
    staged(config, tiny / "local")
    assert copies == ["train_00000.bin", "val_00000.bin", "manifest.json"]
    staged(config, tiny / "local")
    assert len(copies) == 3


@pytest.mark.parametrize("damage", ["shard gone", "shard cut", "no mark", "another's mark", "manifest gone", "begun"])
def test_a_copy_that_is_not_whole_is_replaced(tiny: Path, damage: str) -> None:
    config = tiny_config(tiny)
    target = staged(config, tiny / "local").sources[0].folder
    whole = contents(target)
    if damage == "shard gone":
        (target / "val_00000.bin").unlink()
    elif damage == "shard cut":
        os.truncate(target / "train_00000.bin", 100)
    elif damage == "no mark":
        (target / ".staged").unlink()
    elif damage == "another's mark":
        (target / ".staged").write_text("0" * 32)
    elif damage == "manifest gone":
        (target / "manifest.json").unlink()
    else:
        target.rename(target.with_name(f".{target.name}.partial"))
    staged(config, tiny / "local")
    assert contents(target) == whole
    assert [path.name for path in (tiny / "local").iterdir() if path.is_dir()] == [target.name]


def test_data_that_changed_has_another_copy(tiny: Path) -> None:
    config = tiny_config(tiny)
    first = staged(config, tiny / "local").sources[0].folder
    write_dataset(tiny / "data" / "tiny", seed=1)
    second = staged(config, tiny / "local").sources[0].folder
    assert first != second
    assert load_manifest(first).fingerprint != load_manifest(second).fingerprint


@pytest.mark.slow
def test_killed_at_any_change_of_the_disk_it_leaves_a_whole_copy_or_none(tiny: Path) -> None:
    config = tiny_config(tiny)
    local = tiny / "local"
    target = target_of(config, local)
    survived = False
    for operation in range(1, 40):
        shutil.rmtree(local, ignore_errors=True)
        survived = die_at(operation, lambda: staged(config, local))
        if target.exists():
            assert load_manifest(target).fingerprint == (target / ".staged").read_text()
        staged(config, local)
        assert [path.name for path in local.iterdir() if path.is_dir()] == [target.name]
        if survived:
            break
    assert survived and operation > 5


def test_a_second_job_of_the_node_waits_and_takes_the_first_ones_copy(
    tiny: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "POLL_INTERVAL_S", 0.05)
    config = tiny_config(tiny)
    local = tiny / "local"
    found: list[Path] = []
    second = threading.Thread(target=lambda: found.append(staged(config, local).sources[0].folder))
    one = staging.Staging(tiny / "data" / "tiny", load_manifest(tiny / "data" / "tiny"), target_of(config, local))
    with one_writer(local, staging.LOCK):
        second.start()
        second.join(timeout=3 * files.POLL_INTERVAL_S)
        assert second.is_alive() and not copies  # it stands at the lock
        folder = local / "by-hand"
        folder.mkdir()
        staging.fill(one, folder)
        folder.rename(one.target)
    second.join(timeout=60)
    assert found == [one.target]
    assert len(copies) == 3  # the first one's


# --- what cannot be ---


def test_a_shard_that_is_not_what_its_manifest_says_is_named_and_nothing_is_left(tiny: Path) -> None:
    shard = tiny / "data" / "tiny" / "train_00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError) as damaged:
        staged(tiny_config(tiny), tiny / "local")
    assert str(damaged.value).startswith(f"{shard} is damaged: its hash is ")
    assert str(damaged.value).endswith("restore it, or prepare again with --force")
    assert [path for path in (tiny / "local").iterdir() if path.is_dir()] == []


def test_without_room_nothing_is_begun(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40_000))
    with pytest.raises(UserError, match=r"local has 0\.0 MB free, the datasets need 0\.0 MB: choose another folder"):
        staged(tiny_config(tiny), tiny / "local")
    assert not [path for path in (tiny / "local").iterdir() if path.is_dir()]


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_is_left_as_it_was(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(staging, "sync", full)
    with pytest.raises(UserError, match=r"cannot stage to .*train_00000.bin: No space left on device: choose another"):
        staged(tiny_config(tiny), tiny / "local")
    assert [path for path in (tiny / "local").iterdir() if path.is_dir()] == []


def test_a_variable_is_what_it_is_on_the_node(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tiny / "local"))
    config = tiny_config(tiny)
    assert staged(config, Path("$NODE_DISK/data")).sources[0].folder == target_of(config, tiny / "local" / "data")


@pytest.mark.parametrize("into", ["", "gpt2-124m", "$NODE_DISK", "/scratch/$NODE_DISK"])
def test_a_variable_that_is_not_set_is_no_folder(tiny: Path, into: str) -> None:
    with pytest.raises(UserError, match="invalid --stage .*: expected the absolute path"):
        staged(tiny_config(tiny), Path(into))


def test_a_dry_run_says_what_it_would_copy_and_writes_nothing(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tiny)
    with caplog.at_level("INFO", logger="pipeline"):
        mixture = staged(config, tiny / "local", dry_run=True)
    assert mixture.sources[0].folder == tiny / "data" / "tiny"
    assert f"would be copied to {target_of(config, tiny / 'local')}" in caplog.text
    assert not (tiny / "local").exists()


# --- a run ---


@pytest.mark.slow
def test_a_run_resumes_with_or_without_copies_bit_for_bit(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    weights = []
    for name, stages in (("plain", (None, None)), ("mixed", (tiny / "local", None))):
        for max_steps, stage_to in zip((5, 10), stages, strict=True):
            config = tiny_config(
                tiny, run={"name": name}, train={"max_steps": max_steps}, schedule={"decay_steps": 10}, model={"dropout": 0.1}
            )  # fmt: skip
            caplog.clear()
            run(config, stage_to=stage_to)
            assert (f"data {tiny / 'local' / 'tiny-'}" in caplog.text) == bool(stage_to)
            assert "changed since the checkpoint: data" not in caplog.text
        weights.append(load_file(config.run_dir / "checkpoints" / "step_00000010" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert torch.equal(weights[1][key], tensor), key
    assert not (tiny / "local" / "runs").exists()


@pytest.mark.slow
def test_a_node_that_cannot_stage_ends_all_ranks_with_one_line(tiny: Path) -> None:
    """Two ranks that take themselves for the first of two nodes; the second's disk is a file."""
    (tiny / "sitecustomize.py").write_text("import os\nos.environ['LOCAL_RANK'] = '0'\n")
    (tiny / "disk1").touch()
    config = tiny_config(tiny)
    arguments = ["train", "quickstart", *overrides(config), "--stage", str(tiny / "disk1" / "local")]
    done = run_program(*arguments, cwd=tiny, ranks=2, PYTHONPATH=f"{tiny}:{ROOT}")
    lines = [line for line in done.stderr.splitlines() if "error: " in line and "cannot write" in line]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert not config.run_dir.exists()
