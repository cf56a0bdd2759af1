"""Which checkpoint a start goes on from: the newest that is whole and of this run. A damaged one never ends in a fresh start."""

from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoint.folder import DESCRIPTION, Description, read_description, verify_files
from pipeline.checkpoint.pointers import checkpoint_folders, read_pointer, set_aside, step_of
from pipeline.errors import UserError
from pipeline.log import logger


def candidates(checkpoints: Path, resume: str) -> list[Path]:
    """The checkpoints to try, the newest first, by name alone; empty for a fresh start.

    Raises UserError where checkpoint.resume forbids what is there, or names what is not.
    """
    there = checkpoint_folders(checkpoints)
    if resume not in ("auto", "must", "never"):
        if not (checkpoints / resume).is_dir():
            names = ", ".join(folder.name for folder in there) or "none"
            raise UserError(f"no checkpoint {checkpoints / resume}: checkpoint.resume names it; there are: {names}")
        return [checkpoints / resume]
    latest = _latest(checkpoints)
    found = [folder for folder in reversed(there) if latest is None or step_of(folder) <= latest]
    if latest is not None and not found:
        raise UserError(
            f"{checkpoints}/latest names step {latest}, and there is no checkpoint up to there: "
            "bring it back, or choose another run.name"
        )
    if not found and resume == "must":
        raise UserError(
            f"nothing to resume: {checkpoints} has no checkpoint, and checkpoint.resume=must forbids a fresh start"
        )
    if found and resume == "never":
        raise UserError(
            f"{checkpoints.parent} has checkpoints up to {found[0].name}, and checkpoint.resume=never forbids going on: "
            "choose another run.name, or move the folder away"
        )
    return found


def start_point(checkpoints: Path, resume: str, check: Callable[[Description], None], dry_run: bool) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. `check` raises UserError for one that is not this run's.

    What is newer and cannot be used is set aside once an older one is found that can: where none can, it is the command
    or the disk that is wrong, and everything stays as it is.
    """
    rejected: list[tuple[Path, UserError]] = []
    for folder in candidates(checkpoints, resume):
        try:
            _check(folder, check)
        except UserError as error:
            rejected.append((folder, error))
            continue
        for bad, fault in rejected:
            name = bad.name if dry_run else set_aside(bad, "damaged").name
            logger.warning("not used, and now %s: %s", name, fault)
        if rejected:
            logger.warning("going on from the one before: %s", folder)
        return folder
    if rejected:
        older = f"; nor can {', '.join(folder.name for folder, _ in rejected[1:])} be used" if rejected[1:] else ""
        raise UserError(f"{rejected[0][1]}{older}")
    return None


def _check(folder: Path, check: Callable[[Description], None]) -> None:
    """Raises UserError unless every byte of a checkpoint is as it was written, under its own name, by this run."""
    try:
        description = read_description(folder)
        if description.step != step_of(folder):
            raise UserError(f"checkpoint {folder} is damaged: its {DESCRIPTION} is of step {description.step}")
        check(description)
        verify_files(folder, description)
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from None


def _latest(checkpoints: Path) -> int | None:
    """The step that `latest` names, there or not; None, so that the newest is taken, where it tells nothing."""
    try:
        folder = read_pointer(checkpoints, "latest")
    except UserError as error:
        logger.warning("%s; the newest checkpoint is taken", error)
        return None
    return None if folder is None else step_of(folder)
