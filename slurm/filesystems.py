"""Folders that a job will write to, checked before it waits in the queue."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def nearest(path: Path) -> Path:
    """`path`, or the lowest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def unwritable(folders: Iterable[Path]) -> Iterator[str]:
    """Which of the folders cannot be created or written to, and why."""
    for folder in folders:
        existing = nearest(folder)
        if not existing.is_dir():
            yield f"cannot create {folder}: {existing} is a file; choose another folder"
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield f"cannot write to {folder}: no permission to write to {existing}; choose another folder"
