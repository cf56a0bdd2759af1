"""Which checkpoint a start resumes from: the newest intact one of this run. A damaged one never
leads to a fresh start.
"""

from pathlib import Path
from typing import Any

from pipeline.checkpoint.folder import DESCRIPTION, Description, read_description, verify_files
from pipeline.checkpoint.pointers import checkpoint_folders, read_pointer, set_aside, step_of
from pipeline.config.keys import Config
from pipeline.config.load import from_dict, to_dict
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.runs import RunFolder

# The order of the data and the shapes of the weights follow from these: they cannot change between
# two starts of a run.
FIXED_KEYS = (
    "run.seed", "train.tokens_per_step", "model.arch", "model.n_layer", "model.n_head", "model.n_embd",
    "model.block_size", "model.bias", "model.tie_weights", "data.document_mask",
)  # fmt: skip

# Earlier versions went back a few steps after a spike, and recorded here the samples to pass over.
SKIPPED = "skipped_samples.jsonl"


def candidates(checkpoints: Path, resume: str) -> list[Path]:
    """The checkpoints to try, newest first, judged by their names; empty for a fresh start.

    Raises UserError where checkpoint.resume forbids what was found, or names what does not exist.
    """
    existing = checkpoint_folders(checkpoints)
    if resume not in ("auto", "must", "never"):
        if not (checkpoints / resume).is_dir():
            names = ", ".join(folder.name for folder in existing) or "none"
            raise UserError(f"no checkpoint {checkpoints / resume}: checkpoint.resume names it; found: {names}")
        return [checkpoints / resume]
    latest = _latest_step(checkpoints)
    # What is newer than `latest` was complete when a crash came before the pointer was moved: it is
    # written again.
    found = [folder for folder in reversed(existing) if latest is None or step_of(folder) <= latest]
    if latest is not None and not found:
        raise UserError(
            f"{checkpoints}/latest names step {latest}, but no checkpoint up to that step exists: "
            "restore it, or choose another run.name"
        )
    if not found and resume == "must":
        raise UserError(f"nothing to resume: no {checkpoints}/step_*; checkpoint.resume=must forbids a fresh start")
    if found and resume == "never":
        raise UserError(
            f"{checkpoints.parent} has checkpoints up to {found[0].name}, and checkpoint.resume=never forbids resuming: "
            "choose another run.name, or move the folder away"
        )
    return found


def start_point(config: Config, mixture: Mixture, dry_run: bool) -> Path | None:
    """The checkpoint to resume from, verified; None for a fresh start. Raises UserError where none
    of several can be used.

    Newer ones that cannot be used are set aside once an older one was found that can. Where none
    can, the command or the disk is at fault, and everything stays as it is.
    """
    rejected: list[tuple[Path, UserError]] = []
    folders = candidates(RunFolder(config.run_dir).checkpoints, config.checkpoint.resume)
    if folders and (skips := config.run_dir / SKIPPED).is_file():
        raise UserError(
            f"{skips} lists samples that an earlier version of this program skipped, and this one would train on: "
            "remove the file to accept that, or choose another run.name"
        )
    for folder in folders:
        try:
            _check(folder, config, mixture)
        except UserError as error:
            rejected.append((folder, error))
            continue
        for bad, fault in rejected:
            name = bad.name if dry_run else set_aside(bad, "damaged").name
            logger.warning("not used, and now %s: %s", name, fault)
        if rejected:
            logger.warning("resuming from an older checkpoint: %s", folder)
        return folder
    if rejected:
        older = f"; nor can {', '.join(folder.name for folder, _ in rejected[1:])} be used" if rejected[1:] else ""
        raise UserError(f"{rejected[0][1]}{older}")
    return None


def check_same_run(saved: Description, config: Config, mixture: Mixture) -> None:
    """Raises UserError where resuming would not be the same run; logs which other keys changed."""
    if saved.dataset != mixture.fingerprint:
        raise UserError(
            f"{config.run_dir} was trained on another dataset (fingerprint {saved.dataset[:12]}) than {mixture} "
            f"({mixture.fingerprint[:12]}): restore that one, or choose another run.name"
        )
    before, now = _flat(to_dict(from_dict(saved.config))), _flat(to_dict(config))
    changed = [f"{key} {before.get(key)!r} -> {value!r}" for key, value in now.items() if before.get(key) != value]
    if fixed := ", ".join(change for change in changed if change.split()[0] in FIXED_KEYS):
        raise UserError(f"{config.run_dir} cannot resume with {fixed}: set them back, or choose another run.name")
    if changed:
        logger.info("changed since the checkpoint: %s", ", ".join(changed))


def _check(folder: Path, config: Config, mixture: Mixture) -> None:
    """Raises UserError unless every byte of a checkpoint is as it was written, under its name, by
    this run.
    """
    try:
        description = read_description(folder)
        if description.step != step_of(folder):
            raise UserError(f"checkpoint {folder} is damaged: its {DESCRIPTION} is of step {description.step}")
        check_same_run(description, config, mixture)
        verify_files(folder, description)
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from None


def _latest_step(checkpoints: Path) -> int | None:
    """The step that `latest` names, whether that exists or not; None, so that the newest is used,
    without a valid `latest`.
    """
    try:
        folder = read_pointer(checkpoints, "latest")
    except UserError as error:
        logger.warning("%s; the newest checkpoint is used", error)
        return None
    return None if folder is None else step_of(folder)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
