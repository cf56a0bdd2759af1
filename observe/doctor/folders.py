"""Whether datasets and runs can be written where they go by default: everything that a save does is
tried, on whatever file system that is.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from observe.doctor.findings import Finding, fail, judge
from pipeline.files import publish, sync, unique

WRITTEN_BYTES = 32 << 20
# A checkpoint of the 124M model is 1.5 GB, and three are kept.
LEAST_BYTES, LEAST_INODES = 10 << 30, 10_000
SLOW_BYTES_PER_S = 50e6
SLOW_SYNC_S = 1.0
MOST_SKEW_S = 2.0


def nearest(folder: Path) -> Path:
    """`folder`, or the lowest one above it that exists: a link to nothing does."""
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))


def file_system(folder: Path) -> str:
    """Its type, such as ext4, nfs4 or lustre, by the longest mount point above the folder."""
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []
    found = [match for match in (re.match(r"(?:\S+ ){4}(\S+) .* - (\S+)", line) for line in lines) if match]
    above = [match for match in found if folder.is_relative_to(match[1].replace("\\040", " "))]
    return max(above, key=lambda match: len(match[1]), default={2: "unknown"})[2]


def check_folder(name: str, folder: Path) -> Iterator[Finding]:
    """Free bytes and inodes; then a file is written, synced, renamed over another, locked and read."""
    existing = nearest(folder).resolve()
    kind = file_system(existing)
    where = f"{folder} ({'' if existing == folder.absolute() else f'in {existing}, '}{kind})"
    try:
        space = os.statvfs(existing)
        began = time.monotonic()
        skew_s, sync_s, locks = _try_all(existing)
        write_s = time.monotonic() - began
    except OSError as error:
        advice = "training cannot save there: make room, or choose another folder"
        yield fail(name, f"{where}: {error.strerror or error}", advice)
        return
    free, inodes = space.f_bavail * space.f_frsize, space.f_favail
    speed = WRITTEN_BYTES / write_s
    found = f"{where}: {free / 1e9:,.0f} GB and {inodes:,} inodes free, {speed / 1e6:,.0f} MB/s, fsync {sync_s * 1e3:.0f} ms"
    if not locks:
        advice = "two runs could write it together: mount it with locks (Lustre: -o flock; NFS: without nolock)"
        yield fail(name, f"{where}: a lock that is held is granted again", advice)
    yield from judge(
        name, f"{found}, rename and lock work",
        [(kind == "tmpfs", f"{where} is in memory: it is lost with the machine", "choose a folder on a disk"),
        (free < LEAST_BYTES, f"{where}: {free / 1e9:,.1f} GB free", "make room: a checkpoint has 12 bytes a parameter"),
        # File systems without a table of inodes, such as btrfs, report 0 of 0.
        (space.f_files > 0 and inodes < LEAST_INODES, f"{where}: {inodes:,} inodes free", "remove small files"),
        (speed < SLOW_BYTES_PER_S or sync_s > SLOW_SYNC_S, f"{found}: slow", "checkpoints wait for it: choose another disk"),
        (abs(skew_s) > MOST_SKEW_S, f"{where}: its clock is {skew_s:+.1f} s off this machine's",
         "synchronize both (chrony): the newest run is found by file times")],
    )  # fmt: skip


def _try_all(folder: Path) -> tuple[float, float, bool]:
    """What a save does. Returns seconds by which the file system's clock is ahead, seconds of an
    fsync, and whether a lock keeps a second process out.
    """
    target = folder / f".doctor-{unique()}"
    partial = target.with_suffix(".partial")
    content = os.urandom(1 << 20) * (WRITTEN_BYTES >> 20)
    try:
        target.write_bytes(b"before")
        partial.write_bytes(content)
        publish(partial, target)
        if target.read_bytes() != content:
            raise OSError("what was read is not what was written")
        before = time.time()
        partial.write_bytes(b"small")
        # What lies between two readings of this clock is not skew.
        skew_s = partial.stat().st_mtime - min(max(partial.stat().st_mtime, before), time.time())
        began = time.monotonic()
        sync(partial)
        sync_s = time.monotonic() - began
        with target.open("rb+") as one, target.open("rb+") as other:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locks = False
            except BlockingIOError:
                locks = True
        return skew_s, sync_s, locks
    finally:
        for path in (partial, target):
            path.unlink(missing_ok=True)
