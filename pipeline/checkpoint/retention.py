"""Which checkpoints of a run are kept, and which are removed after a save."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.checkpoint.folder import DESCRIPTION
from pipeline.checkpoint.pointers import best_folder, checkpoint_folders, pointed_folder, step_of


def prune_checkpoints(checkpoints: Path, keep: int, keep_every_steps: int = 0) -> None:
    """Remove all but the `keep` newest checkpoints, those every `keep_every_steps` (0: none),
    `latest` and `best`, and those in use: only folders this program wrote, and partial ones.
    """
    # A folder without a description may be anybody's.
    ours = [folder for folder in checkpoint_folders(checkpoints) if (folder / DESCRIPTION).is_file()]
    permanent = [folder for folder in ours if keep_every_steps and step_of(folder) % keep_every_steps == 0]
    kept = {*ours[-keep:], *permanent, pointed_folder(checkpoints, "latest"), best_folder(checkpoints)}
    for folder in (*(folder for folder in ours if folder not in kept), *checkpoints.glob(".step_*.partial")):
        if not _is_in_use(folder):
            shutil.rmtree(folder)


@contextmanager
def in_use(folder: Path | None) -> Iterator[None]:
    """Keep a run that trains from pruning the checkpoint that another run branches from, while that
    reads it. A lock of the kernel's: it ends with this process. None is no checkpoint.
    """
    with ExitStack() as stack:
        if folder is not None:
            file = stack.enter_context((folder / DESCRIPTION).open("rb"))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _is_in_use(folder: Path) -> bool:
    with suppress(OSError), (folder / DESCRIPTION).open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
