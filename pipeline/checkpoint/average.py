"""`checkpoints/average`: the mean of the weights of a run's newest checkpoints, as one more model folder.

While the learning rate is high the weights move around a point of lower loss; their mean is near it (Izmailov et al. 2018),
so one sees about the loss that a cooldown would lead to. Made when it is asked for: training knows nothing of it.
"""

import shutil
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pipeline.checkpoint.folder import Description, read_description, write_description, write_model
from pipeline.checkpoint.open import open_model
from pipeline.checkpoint.pointers import checkpoint_folders, pointed_folder, step_of
from pipeline.checkpoint.prune import in_use
from pipeline.checkpoint.safetensors_files import Stored
from pipeline.errors import UserError
from pipeline.files import one_writer, publish
from pipeline.log import logger
from pipeline.model.language_model import LanguageModel

AVERAGE = "average"
PATIENCE_S = 600.0  # while another process makes the same one


def average_folder(checkpoints: Path) -> Path | None:
    """The folder, made or replaced unless it is that of the newest checkpoints; None in a run without any.
    Raises UserError where there is only one.
    """
    latest = pointed_folder(checkpoints, "latest")
    if latest is None:
        return None
    final, sources = checkpoints / AVERAGE, _newest(latest)
    if not _is_of(final, sources):
        with one_writer(checkpoints, f".{AVERAGE}.lock", patience_s=PATIENCE_S):
            if not _is_of(final, sources):
                _write(final, sources)
    return final


def _newest(latest: Path) -> dict[Path, Description]:
    """What `checkpoint.keep` keeps as the newest, up to `latest`; not older ones that are there for good."""
    keep = read_description(latest).config["checkpoint"]["keep"]
    folders = [folder for folder in checkpoint_folders(latest.parent) if step_of(folder) <= step_of(latest)][-keep:]
    if len(folders) < 2:
        raise UserError(
            f"{latest.parent} has {len(folders)} checkpoint to average, expected 2 or more: checkpoint.keep={keep} newest "
            "ones are averaged, written every checkpoint.every_steps"
        )
    return {folder: read_description(folder) for folder in folders}


def _is_of(final: Path, sources: dict[Path, Description]) -> bool:
    """Whether an average exists of just these checkpoints; a step may have been trained again since."""
    with suppress(UserError):
        return read_description(final).averaged == {folder.name: source.hash for folder, source in sources.items()}
    return False


def _write(final: Path, sources: dict[Path, Description]) -> None:
    partial, replaced = (final.with_name(f".{final.name}.{state}") for state in ("partial", "replaced.partial"))
    for left_over in (partial, replaced):  # by a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with ExitStack() as stack:
        try:
            for folder in sources:
                stack.enter_context(in_use(folder))
        except FileNotFoundError:
            raise UserError(f"{folder} was removed while it was to be averaged: run the same command again") from None
        opened = [open_model(folder) for folder in sources]
        newest = opened[-1]
        model = LanguageModel.without_memory(newest.config, newest.tokenizer.vocab_size)
        partial.mkdir()
        try:
            tensors = {name: _mean([each.tensors[name] for each in opened]) for name in newest.tensors}
            write_model(partial, model, newest.tokenizer, tensors=tensors)
            averaged = {folder.name: source.hash for folder, source in sources.items()}
            # What a mean of weights has no value of goes back to its default.
            described = replace(sources[newest.folder], val_loss=None, averaged=averaged, files={}, hash="")
            write_description(partial, described)
            if final.is_dir():
                final.rename(replaced)
            publish(partial, final)
        finally:
            for done in (partial, replaced):
                shutil.rmtree(done, ignore_errors=True)
    logger.info("averaged %s into %s", ", ".join(folder.name for folder in sources), final)


def _mean(stored: list[Stored]) -> Tensor:
    """Of one tensor, float32: of each checkpoint's only this one is in memory."""
    total = stored[0].read().double()
    for each in stored[1:]:
        total += each.read()
    return (total / len(stored)).float()
