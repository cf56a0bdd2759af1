"""Where a path lies, and whether other machines see it too."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# Filesystems of one machine. Those on disks may be exported to others; those in memory are not.
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
ON_OWN_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "apfs"}
# By custom each machine has its own.
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
MOUNTS = Path("/proc/self/mounts")


def nearest(path: Path) -> Path:
    """`path`, or the lowest of the folders above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def unwritable(folders: Iterable[Path]) -> Iterator[str]:
    """What is wrong with folders that are to be written to, or made."""
    for folder in folders:
        place = nearest(folder)
        if not place.is_dir():
            yield f"{folder} cannot be a folder: {place} is a file; choose another place"
        elif not os.access(place, os.W_OK | os.X_OK):
            yield f"{folder} cannot be written: {place} is not yours to write to; choose another place"


def not_shared(paths: Iterable[Path]) -> Iterator[str]:
    """Why other nodes may not see the paths, one sentence for each filesystem or folder of this machine's own."""
    by_reason: dict[str, list[str]] = {}
    for path in paths:
        if reason := _own(path):
            by_reason.setdefault(reason, []).append("the folder here" if path == Path() else str(path))
    for reason, names in by_reason.items():
        yield f"{', '.join(dict.fromkeys(names))}: {reason}"


def _own(path: Path) -> str:
    resolved = nearest(path).resolve()
    variables = {name: os.environ.get(name, "") for name in ("TMPDIR", "SLURM_TMPDIR")}
    named = {folder: folder for folder in OWN_FOLDERS} | {
        value: f"${name}" for name, value in variables.items() if value
    }
    for folder, name in named.items():
        if resolved.is_relative_to(folder):
            return f"under {name}, which is another folder on each node"
    mount, kind = filesystem(resolved)
    if kind in IN_MEMORY:
        return f"on {mount}, this machine's own memory ({kind}), which no node sees"
    if kind in ON_OWN_DISKS:
        return f"on {mount}, a disk of this machine ({kind}): right only if the nodes mount it too"
    return ""


def filesystem(path: Path) -> tuple[str, str]:
    """Where the filesystem of a resolved path is mounted, and its type; empty where the system does not tell."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "", ""
    best = ("", "")
    for line in lines:
        _, mount, kind = line.split(" ")[:3]
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount)  # such as \040 for a space
        # Of two on the same place the later one hides the other.
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best
