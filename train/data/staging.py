"""Datasets copied to the node's local disk, from which its ranks then read: `train --stage DIR`.

    DIR/NAME-FINGERPRINT/     the shards, the vocabulary's file and the manifest of one dataset, and
        .staged               the full fingerprint, written last: a folder that has it is complete,
                              and every hash matched

Each node copies once: a second job there waits for the first, and a later one uses the copy if its
marker and the sizes of its files are right. Bytes are not hashed again then: `pipeline verify` does
that. Only damaged copies are ever removed, as sites wipe such disks when a job ends. Checkpoints
and the run's folder are not staged, and a copy has the fingerprint of the original, so a run may
resume with or without this.
"""

import math
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import xxhash

from pipeline.config.keys import Config
from pipeline.dataset import foreign
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.shards import MANIFEST_NAME, Manifest, Shard, check_sizes
from pipeline.errors import UserError
from pipeline.files import HASH_BLOCK_BYTES, one_writer, publish, sync
from pipeline.log import ProgressReport, logger
from pipeline.machine.ranks import World
from pipeline.vocabulary.specs import vocabulary_file

MARKER = ".staged"
FINGERPRINT_DIGITS = 12
# How much later than the fastest node the slowest may finish: terabytes from a busy file system.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Staging:
    """One dataset: its folder and content, and the folder of its copy on this node."""

    source: Path
    manifest: Manifest
    target: Path

    @property
    def small_files(self) -> list[Path]:
        """What is next to the shards, if it exists: the vocabulary's file, then the manifest."""
        names = (vocabulary_file(self.manifest.tokenizer["name"]), MANIFEST_NAME)
        return [self.source / name for name in names if name and (self.source / name).is_file()]

    @property
    def bytes(self) -> int:
        paths = [*(self.source / shard.file for shard in self.manifest.shards), *self.small_files]
        return sum(path.stat().st_size for path in paths)

    def is_complete(self) -> bool:
        """Whether the copy exists with its marker, and each file has its size."""
        marker = self.target / MARKER
        if not marker.is_file() or marker.read_text(encoding="ascii", errors="replace") != self.manifest.fingerprint:
            return False
        try:
            check_sizes(self.target, self.manifest)
        except UserError:
            return False
        copies = {path: self.target / path.name for path in self.small_files}
        return all(copy.is_file() and copy.read_bytes() == path.read_bytes() for path, copy in copies.items())


def stage(mixture: Mixture, config: Config, world: World, *, into: Path, dry_run: bool) -> Mixture:
    """The same mixture, read from copies on this node. All ranks call it together; the first of
    each node copies.

    With `dry_run` nothing is copied, and `mixture` comes back. Raises UserError.
    """
    into = Path(os.path.expandvars(into))  # here, as some variables exist on compute nodes only
    with world.fail_together():
        if not into.is_absolute() or "$" in str(into):
            raise UserError(
                f"invalid --stage {str(into)!r}: expected the absolute path of a folder on the node's local disk; "
                "a variable such as $SLURM_TMPDIR in it must be set on the node"
            )
    stagings = []
    for source in mixture.sources:
        name = f"{source.folder.name}-{source.manifest.fingerprint[:FINGERPRINT_DIGITS]}"
        stagings.append(Staging(source.folder, source.manifest, into / name))
    # Collectives give up after half an hour, and a copy may take longer.
    with world.fail_together(PATIENCE):
        if world.local_rank == 0:
            copy_missing(stagings, dry_run)
    staged = mixture
    with world.fail_together():
        if not dry_run:
            staged = Mixture(config, [staging.target for staging in stagings])
    return staged


def copy_missing(stagings: list[Staging], dry_run: bool) -> None:
    """Copy what is missing, or log what would be copied. Raises UserError, also for errors of the
    disk.
    """
    try:
        for number, staging in enumerate(stagings):
            if staging.is_complete():
                logger.info("stage: %s exists already", staging.target)
            elif dry_run:
                check_space(stagings[number:])
                logger.info("stage: %s would be copied to %s", staging.source, staging.target)
            else:
                copy(staging, stagings[number:])
    except OSError as error:
        raise UserError(
            f"cannot stage to {error.filename or stagings[0].target.parent}: {error.strerror}: "
            "choose another folder for --stage, or omit it"
        ) from None


def check_space(stagings: list[Staging]) -> None:
    """Raises UserError where the disk has no room for what is still to be copied."""
    into = stagings[0].target.parent
    nearest = next(folder for folder in (into, *into.parents) if folder.exists())
    needed = sum(staging.bytes for staging in stagings if not staging.is_complete())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise UserError(
            f"--stage {into} has {free / 1e6:,.1f} MB free, the datasets need {needed / 1e6:,.1f} MB: "
            "choose another folder, or omit --stage"
        )


def copy(staging: Staging, remaining: list[Staging]) -> None:
    """Make the copy, unless another job has done so meanwhile. `remaining`: this one and those
    after it.
    """
    # Another job's copy of a terabyte may take hours: waiting is still cheaper than a second one.
    with one_writer(staging.target.parent, f".{staging.target.name}.lock", patience_s=math.inf):
        if staging.is_complete():
            return
        partial = staging.target.with_name(f".{staging.target.name}.partial")
        for leftover in (partial, staging.target):  # of a process that was killed; a copy that lost files
            if leftover.exists():
                shutil.rmtree(leftover)
        check_space(remaining)
        try:
            partial.mkdir()
            fill(staging, partial)
            publish(partial, staging.target)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)  # a full disk should not stay full
            raise


def fill(staging: Staging, folder: Path) -> None:
    with ProgressReport(f"stage {staging.source.name}", staging.bytes / 1e6, "MB") as report:
        for shard in staging.manifest.shards:
            copy_shard(staging, shard, folder / shard.file, report)
    for path in staging.small_files:
        (folder / path.name).write_bytes(path.read_bytes())
        sync(folder / path.name)
    # Last: a copy without it is started over.
    (folder / MARKER).write_text(staging.manifest.fingerprint, encoding="ascii")
    sync(folder / MARKER)
    logger.info("stage: %s is at %s (%.1f MB)", staging.source, staging.target, staging.bytes / 1e6)


def copy_shard(staging: Staging, shard: Shard, target: Path, report: ProgressReport) -> None:
    """Copy a shard, hashing its bytes on the way. Raises UserError where the hash is not that in
    the manifest.
    """
    source = staging.source / shard.file
    state = xxhash.xxh3_128()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(HASH_BLOCK_BYTES):
            state.update(block)
            writer.write(block)
            report.advance(len(block) / 1e6)
    sync(target)
    found = foreign.sample_hash(target) if staging.manifest.is_foreign else state.hexdigest()
    if found != shard.hash:
        raise UserError(
            f"{source} is damaged: its hash is {found}, expected {shard.hash} from {MANIFEST_NAME}: {staging.manifest.remedy}"
        )
