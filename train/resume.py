"""Which checkpoint a start resumes from: the newest intact one of this run. A damaged one never
leads to a fresh start.

Two other paths lead from a checkpoint: `checkpoint.resume=step_X` goes back inside the run, once,
and run.branch_from begins a new run, in which all but the shapes may change.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.folder import DESCRIPTION, TRAINING_STATE, Description, read_description, verify_files
from pipeline.checkpoint.layouts import layout_of
from pipeline.checkpoint.pointers import (
    checkpoint_folders,
    pointed_folder,
    read_pointer,
    set_aside,
    set_pointer,
    step_of,
)
from pipeline.checkpoint.prune import in_use
from pipeline.config.keys import CHECKPOINT_NAME, Config
from pipeline.config.load import from_dict, to_dict
from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from pipeline.files import unused_name, write_atomic
from pipeline.log import logger
from pipeline.runs import Position, RunFolder
from pipeline.vocabulary.specs import check_same_vocabulary
from train.optimizer.schedule import learning_rate

# The order of the data and the shapes of the weights follow from these: they cannot change between
# two starts of a run.
FIXED_KEYS = (
    "run.seed", "train.tokens_per_step", "optimizer.name", "model.arch", "model.n_layer", "model.n_head", "model.n_kv_head",
    "model.head_dim", "model.n_inner", "model.rope_theta", "model.n_embd", "model.block_size", "model.bias",
    "model.tie_weights", "data.document_mask", "run.branch_from",
)  # fmt: skip

# Earlier versions went back a few steps after a spike, and recorded here the samples to pass over.
SKIPPED = "skipped_samples.jsonl"


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to start from, and where the run that goes on from it began."""

    folder: Path
    began_at: Position


def candidates(checkpoints: Path, resume: str) -> list[Path]:
    """The checkpoints to try, newest first, judged by their names; empty for a fresh start.

    Raises UserError where checkpoint.resume forbids what was found, or names what does not exist.
    """
    existing = checkpoint_folders(checkpoints)
    if CHECKPOINT_NAME.fullmatch(resume) and not is_on_branch(checkpoints, resume):
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
    if not found and resume not in ("auto", "never"):
        raise UserError(f"nothing to resume: no {checkpoints}/step_*; checkpoint.resume={resume} forbids a fresh start")
    if found and resume == "never":
        raise UserError(
            f"{checkpoints.parent} has checkpoints up to {found[0].name}, and checkpoint.resume=never forbids resuming: "
            "choose another run.name, or move the folder away"
        )
    return found


def is_on_branch(checkpoints: Path, resume: str) -> bool:
    """Whether the run went back to the checkpoint that checkpoint.resume names at an earlier start:
    it counts once, or a job that SLURM queues again would never end.
    """
    branch = read_pointer(checkpoints, "branch")
    return branch is not None and branch.name == resume


def start_point(config: Config, mixture: Mixture, dry_run: bool) -> Start | None:
    """The checkpoint to start from, verified; None for a fresh start. Raises UserError where none
    of several can be used.

    Newer ones that cannot be used are set aside once an older one was found that can. Where none
    can, the command or the disk is at fault, and everything stays as it is.
    """
    rejected: list[tuple[Path, UserError]] = []
    checkpoints, resume = RunFolder(config.run_dir).checkpoints, config.checkpoint.resume
    folders = candidates(checkpoints, resume)
    if is_on_branch(checkpoints, resume):
        logger.info(
            "checkpoint.resume=%s: the run went back there before, and resumes from the newest checkpoint since; "
            "to go back again, remove %s", resume, checkpoints / "branch",
        )  # fmt: skip
    if folders and (skips := config.run_dir / SKIPPED).is_file():
        raise UserError(
            f"{skips} lists samples that an earlier version of this program skipped, and this one would train on: "
            "remove the file to accept that, or choose another run.name"
        )
    for folder in folders:
        try:
            description = _check(folder, config, mixture)
        except UserError as error:
            rejected.append((folder, error))
            continue
        for bad, fault in rejected:
            name = bad.name if dry_run else set_aside(bad, "damaged").name
            logger.warning("not used, and now %s: %s", name, fault)
        if rejected:
            logger.warning("resuming from an older checkpoint: %s", folder)
        log_changes(description, config)
        return Start(folder, Position(**description.began_at))
    if rejected:
        older = f"; nor can {', '.join(folder.name for folder, _ in rejected[1:])} be used" if rejected[1:] else ""
        raise UserError(f"{rejected[0][1]}{older}")
    return branch_point(config, mixture) if config.run.branch_from else None


def branch_point(config: Config, mixture: Mixture) -> Start:
    """The checkpoint that run.branch_from names, verified, for a new run. Raises UserError.

    The data continue where the trunk was, or begin where they are others.
    """
    folder = _branch_folder(config)
    saved = read_description(folder)
    key = f"run.branch_from={config.run.branch_from}"
    if shapes := [
        change for name, change in changes(saved, config).items() if name.startswith("model.") and name in FIXED_KEYS
    ]:
        raise UserError(f"{key} has other shapes, {', '.join(shapes)}: set them back, or train from scratch")
    check_same_vocabulary("the dataset", mixture.tokenizer, of=folder, expected=saved.tokenizer)
    if TRAINING_STATE not in saved.files:
        raise UserError(f"{key} has no {TRAINING_STATE}: start from its weights alone with model.init_from")
    if config.train.max_steps <= saved.step:
        raise UserError(f"{key} is at step {saved.step}: set train.max_steps to more than that")
    with in_use(folder):
        verify_files(folder, saved)
    log_changes(saved, config)
    trunk = Position(**saved.began_at).at(saved.step, from_dict(saved.config))
    began_at = trunk if saved.dataset == mixture.fingerprint else replace(trunk, sample=0)
    logger.info("branch of %s: step %d, sample %d, %d tokens", folder, began_at.step, began_at.sample, began_at.tokens)
    return Start(folder, began_at)


def _branch_folder(config: Config) -> Path:
    """A run under run.dir by its name, or the folder of a run or a checkpoint."""
    for path in (Path(config.run.dir) / config.run.branch_from, Path(config.run.branch_from)):
        if (path / "checkpoints").is_dir():
            path = pointed_folder(path / "checkpoints", "latest") or path
        if path.is_dir():
            return path
    raise UserError(
        f"no checkpoint at run.branch_from={config.run.branch_from}: expected a folder such as "
        f"{config.run.dir}/NAME/checkpoints/step_00001000, or a run, for its latest; a run removes its older ones unless "
        "checkpoint.keep or checkpoint.keep_every_steps keeps them"
    )


def enter(run: RunFolder, step: int, resume: str) -> None:
    """Bring a run's folder to the step at which it starts. What it recorded and saved past that is
    kept under other names, for another path leads on from here.
    """
    folders = {step_of(folder): folder for folder in checkpoint_folders(run.checkpoints)}
    if step not in folders:
        drop_rows_after(run, 0)  # of a start that ended before its first checkpoint
    else:
        drop_rows_after(run, step, keep=step < max(folders))
        # First: should the rest be cut off, the next start finds the run at this step.
        if _latest_step(run.checkpoints) != step:
            set_pointer(run.checkpoints, "latest", folders[step])
        for later in (folder for of, folder in folders.items() if of > step):
            aside = set_aside(later, "left_behind")
            logger.warning("%s is past step %d, where this run resumes: renamed to %s", later, step, aside.name)
    # Last, as the next start of the same command then goes on instead.
    if CHECKPOINT_NAME.fullmatch(resume) and not is_on_branch(run.checkpoints, resume):
        set_pointer(run.checkpoints, "branch", run.checkpoints / resume)


def drop_rows_after(run: RunFolder, step: int, keep: bool = False) -> None:
    """Remove what was recorded past `step`, where a run resumes: one curve, no step twice. With
    `keep` into files next to it.
    """
    # A bad step's row has the number of steps before it.
    for path, last in ((run.metrics, step), (run.events, step), (run.bad_steps, step - 1)):
        if not path.is_file():
            continue
        content = path.read_bytes()
        rows = [(_step_of(row), row + b"\n") for row in content.splitlines()]
        kept = b"".join(row for of, row in rows if of <= last)
        dropped = b"".join(row for of, row in rows if last < of < math.inf)
        if keep and dropped:
            write_atomic(unused_name(path.with_name(f"left_behind_{path.name}")), dropped)
        if kept != content:
            write_atomic(path, kept)


def check_same_run(saved: Description, config: Config, mixture: Mixture) -> None:
    """Raises UserError where resuming would not be the same run."""
    changed = changes(saved, config)
    # Needed at the first start only: later ones may omit it, as may have those before.
    omitted = saved.began_at.get("step") and not saved.config["run"].get("branch_from")
    if omitted or not config.run.branch_from:
        changed.pop("run.branch_from", None)
    fixed = [change for name, change in changed.items() if name in FIXED_KEYS]
    if saved.dataset != mixture.fingerprint:
        weights = [change for name, change in changed.items() if name.startswith("the weight of")]
        if not weights:
            raise UserError(
                f"{config.run_dir} was trained on another dataset (fingerprint {saved.dataset[:12]}) than {mixture} "
                f"({mixture.fingerprint[:12]}): restore that one, or choose another run.name"
            )
        fixed += weights
    if fixed:
        shapes = any(change.startswith("model.") for change in fixed)  # which a branch cannot change either
        branch = "" if shapes else "; with run.branch_from a new run may go on from a checkpoint of this one"
        raise UserError(
            f"{config.run_dir} cannot resume with {', '.join(fixed)}: set them back, choose another run.name, or move the "
            f"folder away{branch}"
        )


def changes(saved: Description, config: Config) -> dict[str, str]:
    """What is not as it was when a checkpoint was written: `key before -> now` by key, and each
    weight of a mixture of the same datasets by its name.
    """
    old = from_dict(saved.config)
    before, now = _flat(to_dict(old)), _flat(to_dict(config))
    weights, weights_now = ({source.dataset: source.weight for source in each.datasets} for each in (old, config))
    if list(weights) == list(weights_now):
        for each, values in ((before, weights), (now, weights_now)):
            each.pop("data.mixture")
            each |= {f"the weight of {name!r} in data.mixture": weight for name, weight in values.items()}
    # Keys that say the same in other words: 0 stands for what follows from others.
    model, model_now = (asdict(layout_of(each.model).explicit(each.model)) for each in (old, config))
    now |= {f"model.{name}": before[f"model.{name}"] for name in model if model[name] == model_now[name]}
    return {key: f"{key} {before.get(key)!r} -> {value!r}" for key, value in now.items() if before.get(key) != value}


def log_changes(saved: Description, config: Config) -> None:
    """Report the changed keys, and where they make the learning rate jump."""
    if changed := changes(saved, config):
        logger.info("changed since the checkpoint: %s", ", ".join(changed.values()))
    old = from_dict(saved.config)
    rate, rate_now = learning_rate(saved.step, old), learning_rate(saved.step, config)
    if not math.isclose(rate, rate_now):
        # Both follow from train.max_steps where they are 0.
        names = (
            ["decay_steps", "cooldown_steps"] if old.schedule.kind == config.schedule.kind == "wsd" else ["decay_steps"]
        )
        kept = [
            f"schedule.{name}={getattr(old, name)}" for name in names if getattr(old, name) != getattr(config, name)
        ]
        hint = f": set {' '.join(kept)} to keep the schedule" if kept else ""
        logger.warning("at step %d the learning rate changes from %.2e to %.2e%s", saved.step, rate, rate_now, hint)


def _check(folder: Path, config: Config, mixture: Mixture) -> Description:
    """The description of a checkpoint. Raises UserError unless every byte is as it was written,
    under its name, by this run.
    """
    try:
        description = read_description(folder)
        if description.step != step_of(folder):
            raise UserError(f"checkpoint {folder} is damaged: its {DESCRIPTION} is of step {description.step}")
        check_same_run(description, config, mixture)
        verify_files(folder, description)
        return description
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


def _step_of(row: bytes) -> float:
    """The step of a row; infinity for what a crash left of one, so that it is dropped."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # not JSON, or not even UTF-8
        return math.inf
