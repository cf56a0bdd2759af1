"""Writing: old content or new and nothing between, hashes of whole files, one writer at a time."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from pipeline.errors import UserError
from pipeline.files import HASH_BLOCK_BYTES, hash_bytes, hash_file, one_writer, publish, write_atomic

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from pipeline.files import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def hold(folder: Path) -> subprocess.Popen[str]:
    """A second process that holds `folder` until its stdin is closed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, b"old")

    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    assert visible(tmp_path) == ["status.json"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_content_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is the durability: what a name points to is on the disk before the name is."""
    partial, final = tmp_path / "a.partial", tmp_path / "a"
    partial.write_bytes(b"content")
    names = {partial.stat().st_ino: "content", tmp_path.stat().st_ino: "folder"}
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(f"sync {names[os.fstat(descriptor).st_ino]}")
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    publish(partial, final)
    assert events == ["sync content", "rename", "sync folder"]


@pytest.mark.parametrize("size", [0, 1, HASH_BLOCK_BYTES, HASH_BLOCK_BYTES + 1])
def test_a_files_hash_is_that_of_its_whole_content(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    expected = xxhash.xxh3_128(content).hexdigest()
    assert hash_file(tmp_path / "file") == hash_bytes(content) == expected
    assert len(expected) == 32


def test_a_second_writer_is_told_who_holds_the_folder_until_that_one_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = hold(folder)
    try:
        for _ in range(2):  # a refusal does not wipe out the holder's name
            with pytest.raises(UserError) as caught, one_writer(folder):
                pass
            assert str(caught.value) == (
                f"{folder} is being written by process {holder.pid} on {socket.gethostname()}: "
                "wait for it, or choose another name"
            )
    finally:
        holder.kill()  # SIGKILL: nothing in the holder gets to clean up
        holder.communicate()
    with one_writer(folder):
        assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_writer_with_patience_waits_so_long_and_says_once_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.files.POLL_INTERVAL_S", 0.01)
    caplog.set_level("INFO", "pipeline")
    with one_writer(tmp_path), pytest.raises(UserError, match="wait for it"), one_writer(tmp_path, patience_s=0.05):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is being written by process {os.getpid()} on {socket.gethostname()}: waiting"
    ]


def test_a_folder_is_free_again_after_its_writer_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), one_writer(tmp_path):
        raise ZeroDivisionError
    with one_writer(tmp_path):
        assert visible(tmp_path) == []
