"""Which checkpoint folders a run has, and the two files that name one of them: `latest` and `best`."""

import itertools
from pathlib import Path

from pipeline.config.keys import CHECKPOINT_NAME
from pipeline.errors import UserError
from pipeline.files import read_limited, write_atomic
from pipeline.log import logger

MOST_POINTER_BYTES = 200


def set_pointer(checkpoints: Path, pointer: str, folder: Path) -> None:
    """Make `latest` or `best` name `folder`."""
    write_atomic(checkpoints / pointer, f"{folder.name}\n".encode())


def read_pointer(checkpoints: Path, pointer: str) -> Path | None:
    """The folder whose name `latest` or `best` holds, there or not; None where there is no such pointer."""
    path = checkpoints / pointer
    if not path.is_file():
        return None
    name = read_limited(path, MOST_POINTER_BYTES).decode(errors="replace").strip()
    if not CHECKPOINT_NAME.fullmatch(name):
        raise UserError(
            f"{path} holds {name!r}, wanted a folder's name such as step_00001000: write one of those beside it"
        )
    return checkpoints / name


def pointed_folder(checkpoints: Path, pointer: str) -> Path | None:
    """The folder that `latest` or `best` names; None where there is no such pointer. Raises UserError for a bad one."""
    folder = read_pointer(checkpoints, pointer)
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"{checkpoints / pointer} names {folder.name}, which is not there: write the name of a folder beside it into the file"
        )
    return folder


def best_folder(checkpoints: Path) -> Path | None:
    """The folder that `best` names, None with a warning where it is gone: no reason to end a healthy run."""
    try:
        return pointed_folder(checkpoints, "best")
    except UserError as error:
        logger.warning("%s; taken for absent", error)
        return None


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """What bears a checkpoint's name, whole or not, from the first step to the last."""
    return sorted((path for path in checkpoints.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def set_aside_after(checkpoints: Path, step: int) -> None:
    """A run that goes on from `step` leaves later checkpoints behind: they keep their content under another name."""
    for folder in checkpoint_folders(checkpoints):
        if step_of(folder) > step:
            aside = set_aside(folder, "left_behind")
            logger.warning("%s is past step %d, where this run goes on: now %s", folder, step, aside.name)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint to `why` and its old name, which nothing looks for; `best` no longer names it."""
    names = (f"{why}_{folder.name}{suffix}" for suffix in itertools.chain([""], (f"_{n}" for n in itertools.count(2))))
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    folder.rename(aside)
    pointer = folder.parent / "best"
    if pointer.is_file() and pointer.read_bytes().strip() == folder.name.encode():
        pointer.unlink()
    return aside
