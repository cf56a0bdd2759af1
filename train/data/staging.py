"""Datasets copied to the node's local disk, from which its ranks then read: `train --stage DIR`.

    DIR/NAME-FINGERPRINT/     the shards, the vocabulary's file and the manifest of one dataset, and
        .staged               the full fingerprint, written last: a folder that has it is complete,
                              and every hash matched

One process of a node copies at a time: a second job there waits for the first, and a later one uses
the copy if its marker and the sizes of its files are right. Bytes are not hashed again then: `pipeline verify` does
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
from pipeline.dataset.shards import MANIFEST_NAME, Manifest
from pipeline.errors import UserError
from pipeline.files import HASH_BLOCK_BYTES, one_writer, publish, sync
from pipeline.log import ProgressReport, logger
from pipeline.machine.ranks import World
from pipeline.vocabulary.specs import vocabulary_file

MARKER, LOCK = ".staged", ".stage.lock"
FINGERPRINT_DIGITS = 12
# How much later than the fastest node the slowest may finish: terabytes from a busy file system.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Staging:
    """One dataset: its folder and content, and the folder of its copy on this node."""

    source: Path
    manifest: Manifest
    target: Path

    def sizes(self, folder: Path) -> dict[str, int]:
        """Bytes of each file of the dataset as it is in `folder`: the shards, then the vocabulary's
        file and the manifest, where the source has them. Raises OSError if one is missing.
        """
        small = [vocabulary_file(self.manifest.tokenizer["name"]), MANIFEST_NAME]
        names = [shard.file for shard in self.manifest.shards]
        names += [name for name in small if name and (self.source / name).is_file()]
        return {name: (folder / name).stat().st_size for name in names}

    def is_complete(self) -> bool:
        """Whether the copy exists with its marker, and each file has its size."""
        try:
            marker = (self.target / MARKER).read_text(encoding="ascii", errors="replace")
            return marker == self.manifest.fingerprint and self.sizes(self.target) == self.sizes(self.source)
        except (FileNotFoundError, NotADirectoryError):
            return False


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
            copy_missing(stagings, into, dry_run)
    with world.fail_together():
        mixture = mixture if dry_run else Mixture(config, [staging.target for staging in stagings])
    return mixture


def copy_missing(stagings: list[Staging], into: Path, dry_run: bool) -> None:
    """Copy what is missing, or log what would be copied. Raises UserError, also for errors of the
    disk.
    """
    try:
        missing = [staging for staging in stagings if not staging.is_complete()]
        if dry_run:
            check_space(missing, into)
            for staging in missing:
                logger.info("stage: %s would be copied to %s", staging.source, staging.target)
        elif missing:
            # Another job's copy of a terabyte may take hours: waiting is still cheaper than a
            # second one, and only a single writer knows how much space will be left.
            with one_writer(into, LOCK, patience_s=math.inf):
                missing = [staging for staging in missing if not staging.is_complete()]
                check_space(missing, into)
                for staging in missing:
                    copy(staging)
    except OSError as error:
        reason = f"{error.filename or into}: {error.strerror}"
        raise UserError(f"cannot stage to {reason}: choose another folder for --stage, or omit it") from None


def check_space(missing: list[Staging], into: Path) -> None:
    """Raises UserError where the disk has no room for what is to be copied."""
    nearest = next(folder for folder in (into, *into.parents) if folder.exists())
    needed = sum(sum(staging.sizes(staging.source).values()) for staging in missing)
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise UserError(
            f"--stage {into} has {free / 1e6:,.1f} MB free, the datasets need {needed / 1e6:,.1f} MB: "
            "choose another folder, or omit --stage"
        )


def copy(staging: Staging) -> None:
    """Make the copy: under another name until it is complete, so that it is all there or not."""
    partial = staging.target.with_name(f".{staging.target.name}.partial")
    for leftover in (partial, staging.target):  # of a process that was killed; a copy that lost files
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        partial.mkdir()
        fill(staging, partial)
        publish(partial, staging.target)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)  # a full disk should not stay full
        raise


def fill(staging: Staging, folder: Path) -> None:
    """Copy every file into `folder`, then write the marker. Raises UserError for a damaged shard."""
    expected = {shard.file: shard.hash for shard in staging.manifest.shards}
    sizes = staging.sizes(staging.source)
    megabytes = sum(sizes.values()) / 1e6
    with ProgressReport(f"stage {staging.source.name}", megabytes, "MB") as report:
        for name in sizes:
            found = copy_file(staging.source / name, folder / name, report)
            if staging.manifest.is_foreign:
                found = foreign.sample_hash(folder / name)
            if found != expected.get(name, found):
                raise UserError(
                    f"{staging.source / name} is damaged: its hash is {found}, expected {expected[name]} "
                    f"from {MANIFEST_NAME}: {staging.manifest.remedy}"
                )
    # Last: a copy without it is started over.
    (folder / MARKER).write_text(staging.manifest.fingerprint, encoding="ascii")
    sync(folder / MARKER)
    logger.info("stage: %s is at %s (%.1f MB)", staging.source, staging.target, megabytes)


def copy_file(source: Path, target: Path, report: ProgressReport) -> str:
    """Copy a file to the disk, and return the hash of its bytes, which are read once."""
    state = xxhash.xxh3_128()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(HASH_BLOCK_BYTES):
            state.update(block)
            writer.write(block)
            report.advance(len(block) / 1e6)
    sync(target)
    return state.hexdigest()
