"""The checkpoint folders of a run, and the files that each name one of them: `latest`, `best`, and
`branch`, the one that checkpoint.resume went back to last.
"""

from pathlib import Path

from pipeline.config.keys import CHECKPOINT_NAME
from pipeline.errors import UserError
from pipeline.files import read_limited, unused_name, write_atomic
from pipeline.log import logger

MOST_POINTER_BYTES = 200


def set_pointer(checkpoints: Path, pointer: str, folder: Path) -> None:
    """Make `latest`, `best` or `branch` name `folder`."""
    write_atomic(checkpoints / pointer, f"{folder.name}\n".encode())


def read_pointer(checkpoints: Path, pointer: str) -> Path | None:
    """The folder that `latest`, `best` or `branch` names, whether it exists or not; None where
    there is no such file.
    """
    path = checkpoints / pointer
    if not path.is_file():
        return None
    name = read_limited(path, MOST_POINTER_BYTES).decode(errors="replace").strip()
    if not CHECKPOINT_NAME.fullmatch(name):
        raise UserError(f"{path} contains {name!r}, expected the name of a folder next to it, such as step_00001000")
    return checkpoints / name


def pointed_folder(checkpoints: Path, pointer: str) -> Path | None:
    """The folder that `latest` or `best` names; None where there is no such file. Raises UserError
    for a bad one.
    """
    folder = read_pointer(checkpoints, pointer)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{checkpoints / pointer} names {folder.name}, which does not exist: name a folder next to it")
    return folder


def best_folder(checkpoints: Path) -> Path | None:
    """The folder that `best` names; None, with a warning, where it is gone: no reason to end a
    healthy run.
    """
    try:
        return pointed_folder(checkpoints, "best")
    except UserError as error:
        logger.warning("%s; ignoring `best`", error)
        return None


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Folders with a checkpoint's name, complete or not, by step."""
    # By number: as text, step_100000000 would come before step_20000000.
    return sorted((path for path in checkpoints.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint to `why` and its old name, so that nothing finds it; `best` no longer
    names it.
    """
    # A run may be set back to the same step several times.
    aside = unused_name(folder.with_name(f"{why}_{folder.name}"))
    folder.rename(aside)
    pointer = folder.parent / "best"
    if pointer.is_file() and pointer.read_bytes().strip() == folder.name.encode():
        pointer.unlink()
    return aside
