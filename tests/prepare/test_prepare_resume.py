"""Preparation that is disturbed: killed, out of disk, shared by tasks. The bytes are those of an undisturbed run."""

import gzip
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import die_at, write_gz, write_jsonl, write_text_files

from pipeline.dataset.shards import MANIFEST_NAME, load_manifest
from pipeline.errors import UserError
from pipeline.files import hash_file
from prepare import units
from prepare.run import PrepareOptions, merge, run
from prepare.storage.files import local_file
from prepare.unfinished.journal import Journal, Share, tasks_of

ROOT = Path(__file__).parents[2]
WORDS = ["the", " cat", " sat", "\n\n", "  ", "naïve", " 東京", "🙂", " 1234", "def f(x):\n    return x", "'ll", "\t"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    texts = [f"{i} " + "".join(chance.choices(WORDS, k=chance.randint(1, 120))) for i in range(count)]
    texts[3] = ""
    texts[count // 2] = texts[1]
    return texts


def write_parquet(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=len(texts) // 3)
    return folder / "c.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset but the lock, whose content names a process."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".lock")}


def options_for(tmp_path: Path, source: Path, name: str, **more: Any) -> PrepareOptions:
    fixed = {"data_dir": str(tmp_path / "data"), "shard_tokens": 20_000, "workers": 1}
    return PrepareOptions([str(source)], name=name, **(fixed | more))


def start(options: PrepareOptions, unit_bytes: int = 1 << 14) -> subprocess.Popen[str]:
    """A preparation in a process of its own, with its workers in its group; by tiktoken, which leaves time to kill it."""
    script = (
        "import sys, prepare.run, prepare.units\n"
        "if __name__ == '__main__':\n"
        "    sys.modules['gigatoken'] = sys.modules['fastokens'] = None\n"
        f"    prepare.units.SMALLEST_UNIT_BYTES = {unit_bytes}\n"
        f"    prepare.run.run(prepare.run.{options!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, start_new_session=True, text=True, stderr=subprocess.PIPE
    )


def finish(options: PrepareOptions) -> None:
    process = start(options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def unfinished_parts(options: PrepareOptions) -> int:
    return len(list((Path(options.data_dir) / options.name / "unfinished").glob("*.part")))


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_midway_it_goes_on_where_it_was(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path, make_texts(4000))
    options = options_for(tmp_path, source, "killed", workers=2)
    victim = start(options)
    wait_until(lambda: unfinished_parts(options) >= 5 or victim.poll() is not None)
    victim.kill()
    victim.wait()
    folder = tmp_path / "data" / "killed"
    with pytest.raises(UserError, match="not a complete dataset"):
        load_manifest(folder)
    wait_until(lambda: not group_is_alive(victim.pid))  # its workers do not outlive it
    done = {path: path.stat().st_mtime_ns for path in (folder / "unfinished").glob("*.part")}
    assert len(done) >= 5
    second = start(options)
    wait_until(lambda: unfinished_parts(options) > len(done) or second.poll() is not None)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert second.wait() == 0
    finish(options_for(tmp_path, source, "undisturbed"))
    assert contents(folder) == contents(tmp_path / "data" / "undisturbed")


@pytest.mark.campaign
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_text_files, write_gz])
def test_killed_at_random_moments(tmp_path: Path, write: Callable[..., Path], workers: int) -> None:
    """Six kills each, 72 in all: of the parent alone, of all its processes, or of one of its workers."""
    source = write(tmp_path, make_texts(8000))
    reference = options_for(tmp_path, source, "undisturbed", workers=workers)
    began = time.monotonic()
    finish(reference)
    duration = time.monotonic() - began
    options = options_for(tmp_path, source, "killed", workers=workers)
    chance = random.Random(f"{write.__name__}{workers}")
    kills = 0
    while kills < 6:
        victim = start(options)
        try:
            victim.communicate(timeout=chance.uniform(0.2, 0.9) * duration)
            assert victim.returncode == 0
            shutil.rmtree(tmp_path / "data" / "killed")  # it came to its end: from the beginning
        except subprocess.TimeoutExpired:
            kill_some(victim, chance.choice(["parent", "group", "worker"]))
            kills += 1
    finish(options)
    assert contents(tmp_path / "data" / "killed") == contents(tmp_path / "data" / "undisturbed")


def kill_some(victim: subprocess.Popen[str], who: str) -> None:
    if who == "worker":
        listed = subprocess.run(["pgrep", "-P", str(victim.pid)], capture_output=True, text=True, check=False)
        for worker in listed.stdout.split()[-1:]:
            os.kill(int(worker), signal.SIGKILL)
    elif who == "parent":
        victim.kill()
    else:
        os.killpg(victim.pid, signal.SIGKILL)
    try:
        victim.communicate(timeout=30)  # without a worker it ends by itself, with one line
    except subprocess.TimeoutExpired:
        victim.kill()
        victim.communicate()
    wait_until(lambda: not group_is_alive(victim.pid))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    "every", [pytest.param(17, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.campaign)]
)
def test_killed_before_each_change_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool, every: int
) -> None:
    """Each rename, sync and removal of a whole preparation in turn, also where it replaces an earlier dataset."""
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)
    source = write_jsonl(tmp_path, make_texts(40))
    other = tmp_path / "other"
    other.mkdir()
    older = write_jsonl(other, make_texts(50, seed=1))
    fixed: dict[str, Any] = {"tokenizer": "char", "shard_tokens": 1500, "dedup": True}
    run(options_for(tmp_path, source, "undisturbed", **fixed))
    wanted = contents(tmp_path / "data" / "undisturbed")
    folder = tmp_path / "data" / "killed"
    options = options_for(tmp_path, source, "killed", force=earlier, **fixed)
    for operation in itertools.count(1, every):
        shutil.rmtree(folder, ignore_errors=True)
        if earlier:
            run(options_for(tmp_path, older, "killed", **fixed))
        before = contents(folder) if earlier else {}
        ended = die_at(operation, lambda: run(options))
        if (folder / MANIFEST_NAME).exists():  # what has a manifest is whole, the old one or the new one
            manifest = load_manifest(folder)
            hashes = {shard.file: shard.hash for shards in manifest.splits.values() for shard in shards}
            there = contents_of_shards(folder)
            assert there == {name: content for name, content in (wanted | before).items() if name in there} or all(
                there[name] == wanted[name] for name in hashes
            )
        run(options)
        assert contents(folder) == wanted
        if ended:
            break
    assert operation > 40


def contents_of_shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


# ---- what changed in between -----------------------------------------------------------------------------------------


@pytest.fixture
def half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareOptions:
    """A preparation that was cut off after some units."""
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)
    source = write_jsonl(tmp_path, make_texts(100))
    options = options_for(tmp_path, source, "half", shard_tokens=1500)
    assert not die_at(30, lambda: run(options))
    assert unfinished_parts(options) > 1
    return options


def changed(options: PrepareOptions, **changes: Any) -> PrepareOptions:
    return PrepareOptions(**(vars(options) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "byte"}, "tokenizer was 'gpt2' and is now 'byte'"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"shard_tokens": 7}, "shard_tokens was 1500 and is now 7"),
        ({"dedup": True}, "dedup was False and is now True"),
    ],
)
def test_another_option_in_between_is_refused_and_named(
    half_done: PrepareOptions, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(changed(half_done, **changes))
    assert all(part in str(caught.value) for part in ("half prepared", words, "--force", "--name"))
    run(changed(half_done, force=True, **changes))
    assert load_manifest(Path(half_done.data_dir) / "half").options.items() >= changes.items()


@pytest.mark.slow
def test_a_plan_of_another_version_is_refused_and_named(half_done: PrepareOptions, tmp_path: Path) -> None:
    plan = tmp_path / "data" / "half" / "unfinished" / "plan.json"
    document = orjson.loads(plan.read_bytes())
    document["constants"]["units.SPLITTING"] -= 1
    plan.write_bytes(orjson.dumps(document))
    with pytest.raises(
        UserError, match=r"half prepared.*program changed: units\.SPLITTING was 1 and is now 2.*--force"
    ):
        run(half_done)
    plan.write_bytes(plan.read_bytes()[:50])
    with pytest.raises(UserError, match=r"half prepared.*another version .* or plan\.json is damaged.*--force"):
        run(half_done)
    folder = run(changed(half_done, force=True))
    run(changed(half_done, name="afresh"))
    assert contents(folder) == contents(tmp_path / "data" / "afresh")


@pytest.mark.slow
def test_a_source_that_was_only_touched_is_the_same(half_done: PrepareOptions, tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    Journal(tmp_path / "data" / "half").note_hashes(0, [(local_file(source), hash_file(source))])
    os.utime(source, ns=(1, 1))
    folder = run(half_done)
    run(changed(half_done, name="afresh"))
    assert contents(folder) == contents(tmp_path / "data" / "afresh")


def test_without_a_finished_unit_nothing_is_lost_and_nobody_asked(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("not json\n")
    with pytest.raises(UserError, match="not JSON"):
        run(options_for(tmp_path, source, "mended"))
    source.write_text('{"text": "a"}\n{"text": "b"}\n')
    run(options_for(tmp_path, source, "mended"))


@pytest.mark.slow
def test_the_fault_of_a_library_is_remembered(half_done: PrepareOptions, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "data" / "half")
    done = unfinished_parts(half_done)
    journal.distrust("gigatoken", "differs")
    limited = journal.folder / f"{'0' * 32}_000000.first_1"
    if any(b'"gigatoken"' in (part := path).read_bytes() for path in journal.folder.glob("*.part")):
        limited.write_bytes(part.read_bytes())
    trusted = sum(len(units) for units in journal.finished().values())
    assert not limited.exists()
    assert trusted < done or not any(b'"gigatoken"' in path.read_bytes() for path in journal.folder.glob("*.part"))
    folder = run(half_done)
    run(changed(half_done, name="afresh"))
    assert contents(folder) == contents(tmp_path / "data" / "afresh")


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_too_little_room_is_told_before_anything_is_done(tmp_path: Path, small_disk: Path) -> None:
    source = write_jsonl(tmp_path, make_texts(30_000))
    result = pipeline("prepare", str(source), "--data-dir", str(small_disk))
    assert result.returncode == 2
    assert "MB free, expected about" in result.stderr.splitlines()[-1]
    assert not list(small_disk.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_in_the_middle_is_one_line_and_loses_nothing(
    tmp_path: Path, small_disk: Path, workers: str
) -> None:
    source = write_jsonl(tmp_path, make_texts(6000))
    arguments = ("prepare", str(source), "--data-dir", str(small_disk), "--limit-docs", "100000", "--workers", workers)
    result = pipeline(*arguments)  # with a limit the need is unknown, and it starts
    assert result.returncode == 2, result.stderr
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = pipeline(*arguments)
    assert result.returncode == 0, result.stderr
    run(options_for(tmp_path, source, "c", limit_docs=100_000, shard_tokens=100_000_000))
    assert contents(small_disk / "c") == contents(tmp_path / "data" / "c")


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
def test_tasks_share_neighbours_by_their_bytes(tasks: int) -> None:
    sizes = np.random.default_rng(0).integers(0, 1000, 50).tolist()
    found = tasks_of(sizes, tasks)
    assert found == sorted(found)
    assert set(found) == set(range(tasks))
    shares = [sum(sizes[item] for item in Share(task, tasks).items(sizes)) for task in range(tasks)]
    assert sum(shares) == sum(sizes)
    assert max(shares) - min(shares) <= 2 * max(sizes)
    assert tasks_of([], 3) == []


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareOptions:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 2048)
    source = write_jsonl(tmp_path, make_texts(300))
    run(options_for(tmp_path, source, "alone", tokenizer="char"))
    return options_for(tmp_path, source, "shared", tokenizer="char", tasks=3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_task_that_finishes_last_makes_the_dataset(
    tmp_path: Path, shared: PrepareOptions, order: tuple[int, ...]
) -> None:
    folder = tmp_path / "data" / "shared"
    for task in order:
        assert not (folder / MANIFEST_NAME).exists()
        run(changed(shared, task_id=task))
    assert contents(folder) == contents(tmp_path / "data" / "alone")
    run(changed(shared, task_id=1))  # again, when all is done
    assert contents(folder) == contents(tmp_path / "data" / "alone")


def test_a_task_that_is_killed_is_run_again_and_merge_says_what_is_missing(
    tmp_path: Path, shared: PrepareOptions
) -> None:
    folder = tmp_path / "data" / "shared"
    run(changed(shared, task_id=0))
    run(changed(shared, task_id=2))
    assert not die_at(20, lambda: run(changed(shared, task_id=1)))
    with pytest.raises(UserError, match=r"not complete.*--task-id 1 of --tasks 3"):
        merge(folder)
    run(changed(shared, task_id=1))
    assert contents(folder) == contents(tmp_path / "data" / "alone")
    merge(folder)


def test_merge_makes_the_dataset_when_no_task_did(
    tmp_path: Path, shared: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("prepare.run._finish_if_last", lambda *_: True)
        for task in range(3):
            run(changed(shared, task_id=task))
    monkeypatch.chdir(tmp_path / "data")
    merge(Path("shared"))
    assert contents(tmp_path / "data" / "shared") == contents(tmp_path / "data" / "alone")


@pytest.mark.slow
def test_tasks_at_the_same_time_with_one_killed(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, make_texts(4000))
    options = options_for(tmp_path, source, "shared", tasks=3)
    folder = tmp_path / "data" / "shared"
    running = [start(changed(options, task_id=task)) for task in range(3)]
    wait_until(lambda: (folder / ".lock_0001").exists())
    running[1].kill()
    for process in running:
        process.communicate()
    assert not (folder / MANIFEST_NAME).exists()
    finish(changed(options, task_id=1))
    finish(options_for(tmp_path, source, "alone"))
    assert contents(folder) == contents(tmp_path / "data" / "alone")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_id": 3, "tasks": 3}, "0 .. tasks - 1"),
        ({"task_id": 0, "tasks": None}, "expected both"),
        ({"task_id": 0, "tasks": 0}, "0 .. tasks - 1"),
        ({"task_id": None, "tasks": 3}, "expected both"),
        ({"task_id": 0, "tasks": 2, "limit_docs": 5}, "--limit-docs cannot be combined with --tasks"),
        ({"task_id": 0, "tasks": 2, "force": True}, "--force cannot be combined with --tasks"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(shared: PrepareOptions, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(changed(shared, **changes))


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_megabytes(options: PrepareOptions) -> float:
    """The most that a preparation and its workers held at one time, as the kernel counts pages that are not shared."""
    process = start_plainly(options)
    peak = 0.0
    while process.poll() is None:
        listed = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False)
        peak = max(peak, sum(map(resident_megabytes, listed.stdout.split())))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


def start_plainly(options: PrepareOptions) -> subprocess.Popen[bytes]:
    script = f"import prepare.run\nif __name__ == '__main__':\n    prepare.run.run(prepare.run.{options!r})\n"
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)


def resident_megabytes(pid: str) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


@pytest.mark.campaign
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_follow_the_corpus(tmp_path: Path) -> None:
    texts = make_texts(20_000)
    peaks = {}
    for copies in (4, 40):
        source = tmp_path / f"{copies}.jsonl"
        with source.open("wb") as file:
            for copy in range(copies):
                file.writelines(orjson.dumps({"text": f"{copy} {text}"}) + b"\n" for text in texts)
        options = options_for(tmp_path, source, f"of_{copies}", workers=2, shard_tokens=100_000_000)
        peaks[copies] = peak_megabytes(options)
    assert max(peaks.values()) < 1000
    assert peaks[40] < peaks[4] + 150


@pytest.mark.campaign
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz"])
def test_memory_does_not_follow_the_longest_document(tmp_path: Path, form: str) -> None:
    words = " ".join(make_texts(2000))
    peaks = {}
    for size in (2_000_000, 200_000_000):
        text = words * (size // len(words) + 1)
        content = text.encode() if form == "txt" else orjson.dumps({"text": text}) + b'\n{"text": "another"}\n'
        source = tmp_path / f"{size}.{form}"
        source.write_bytes(gzip.compress(content, 1) if form.endswith("gz") else content)
        peaks[size] = peak_megabytes(options_for(tmp_path, source, f"of_{size}", workers=2))
    # A JSON value is held: as it is in the file, decoded, and as UTF-8. A text is not.
    held = 0 if form == "txt" else 1500
    assert max(peaks.values()) < 1000 + held
    assert peaks[200_000_000] < peaks[2_000_000] + 300 + held  # two workers of 100 MB more at the most
