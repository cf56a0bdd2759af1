"""The state of a preparation is files in `<dataset>/unfinished/` alone: it survives any kill.

    plan.json           what is prepared, from what, and how; written first, by the first task
    000012_000000.part  a finished unit
    hashes_0000.jsonl   hashes of the source files, one file per task
    distrusted_NAME     exists once the library NAME was found at fault; holds the fault
    evaluation_ngrams   of the texts to keep out (--decontaminate)
    dataset/            shards and vocabulary while they are made; the manifest is written last

Once `dataset/manifest.json` exists, all that is left is to move those files up, which can be
repeated after any kill.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from pipeline.dataset.shards import LISTING_NAME, MANIFEST_NAME, Manifest
from pipeline.files import sync, write_atomic
from pipeline.vocabulary.specs import vocabulary_file
from prepare.unfinished.parts import part_name, read_summary

SHARD_NAME = re.compile(r"(train|val)_\d{5,}\.bin")


class Share(NamedTuple):
    """The items that fall to one of `tasks` programs, such as the jobs of a SLURM array."""

    task: int
    tasks: int

    def items(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of its items: neighbours, as one machine reads the units of a file best."""
        return [item for item, task in enumerate(tasks_of(sizes, self.tasks)) if task == self.task]


def tasks_of(sizes: Sequence[int], tasks: int) -> list[int]:
    """The task of each item of `sizes` bytes, so that all tasks have about the same bytes."""
    # An item belongs to the task whose equal share of all bytes contains the item's middle. One
    # byte is added to each item, so that empty ones spread as well.
    ends = list(accumulate(size + 1 for size in sizes))
    return [(2 * end - size - 1) * tasks // (2 * ends[-1]) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class Plan:
    """What determines a dataset's bytes, and its sources.

    `sizes`: bytes per item; `stamps` reveal a changed source; `splitting`: the `SPLITTING` that
    numbered the units, 0 in a plan from before it was recorded.
    """

    sources: list[str]
    working_folder: str
    options: dict[str, Any]
    stamps: dict[str, Any]
    tokenizer: dict[str, Any]
    sizes: list[int]
    tasks: int
    splitting: int = 0


class Journal:
    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.folder = dataset / "unfinished"
        self.staged = self.folder / "dataset"

    # ---- the plan

    def plan(self) -> Plan | None:
        path = self.folder / "plan.json"
        return Plan(**orjson.loads(path.read_bytes())) if path.exists() else None

    def begin(self, plan: Plan, vocabulary: dict[str, bytes]) -> None:
        """Write the plan, unless another task has written one first."""
        self.staged.mkdir(parents=True, exist_ok=True)
        for name, content in vocabulary.items():
            write_atomic(self.staged / name, content)
        mine = self.folder / f"plan.{os.uname().nodename}.{os.getpid()}"
        write_atomic(mine, orjson.dumps(asdict(plan)))
        try:
            # link(2) fails if the name exists, where rename(2) would replace the plan of the task
            # that was first.
            (self.folder / "plan.json").hardlink_to(mine)
        except FileExistsError:
            return
        finally:
            mine.unlink()
        sync(self.folder)

    def clear(self) -> None:
        """Remove everything."""
        # Renamed first: parts that a kill left without their plan would count for the next.
        with suppress(FileNotFoundError):
            self.folder.rename(self.dataset / f".unfinished.{os.uname().nodename}.{os.getpid()}")
        for leftover in self.dataset.glob(".unfinished.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    # ---- parts

    def finished_units(self) -> dict[int, set[int]]:
        """Item -> its finished units.

        Once a library is at fault, the parts it encoded are removed and do not count.
        """
        found: dict[int, set[int]] = {}
        distrusted = self.distrusted()
        for entry in os.scandir(self.folder):
            if not entry.name.endswith(".part"):
                continue
            if distrusted and read_summary(Path(entry.path)).engine in distrusted:
                Path(entry.path).unlink(missing_ok=True)
                continue
            item, unit = entry.name.removesuffix(".part").split("_")
            found.setdefault(int(item), set()).add(int(unit))
        return found

    def is_complete(self, item: int, units: set[int]) -> bool:
        """Whether `units` are all units of the item.

        Only the part of its last one tells how many.
        """
        highest = max(units, default=-1)
        return len(units) == highest + 1 > 0 and read_summary(self.folder / part_name(item, highest)).last

    def parts(self, limit: int | None) -> list[Path]:
        """All parts in corpus order.

        With a limit, up to the one in which that document count is reached.
        """
        found = self.finished_units()
        paths = [self.folder / part_name(item, unit) for item in sorted(found) for unit in sorted(found[item])]
        if limit is None:
            return paths
        documents_before = accumulate((read_summary(path).documents for path in paths), initial=0)
        return [path for path, before in zip(paths, documents_before, strict=False) if before < limit]

    def incomplete_items(self, plan: Plan) -> list[int]:
        found = self.finished_units()
        return [item for item in range(len(plan.sizes)) if not self.is_complete(item, found.get(item, set()))]

    # ---- libraries at fault

    def distrust(self, library: str, fault: str) -> None:
        write_atomic(self.folder / f"distrusted_{library}", fault.encode())

    def distrusted(self) -> set[str]:
        return {path.name.removeprefix("distrusted_") for path in self.folder.glob("distrusted_*")}

    # ---- hashes of the source files

    def known_hashes(self) -> dict[str, tuple[Any, str]]:
        """Path -> (stamp, hash) of every source file that any task has hashed.

        A line truncated by a kill is skipped.
        """
        found = {}
        for path in self.folder.glob("hashes_*.jsonl"):
            for line in path.read_bytes().splitlines():
                with suppress(orjson.JSONDecodeError):
                    name, stamp, digest = orjson.loads(line)
                    found[name] = (stamp, digest)
        return found

    def note_hashes(self, paths: list[Path], task: int, hashes: Iterator[tuple[Any, str]]) -> None:
        """Append the (stamp, hash) of each path as it arrives."""
        with (self.folder / f"hashes_{task:04d}.jsonl").open("ab") as file:
            for path, (stamp, digest) in zip(paths, hashes, strict=True):
                file.write(orjson.dumps([str(path), stamp, digest]) + b"\n")
                file.flush()

    # ---- publishing

    def is_publishing(self) -> bool:
        return (self.staged / MANIFEST_NAME).exists()

    def publish(self, manifest: Manifest) -> None:
        manifest.save(self.staged)
        self.finish_publishing()

    def finish_publishing(self) -> None:
        """Move the staged dataset over the one it replaces; the caller holds the exclusive lock.

        The old manifest goes first and the new one comes last, so that a manifest never stands next
        to other shards.
        """
        if not self.is_publishing():
            return
        sync(self.staged)
        manifest = orjson.loads((self.staged / MANIFEST_NAME).read_bytes())
        wanted = {shard["file"] for shards in manifest["splits"].values() for shard in shards}
        self._remove_old_manifest()
        for old in self.dataset.iterdir():
            if SHARD_NAME.fullmatch(old.name) and old.name not in wanted:
                old.unlink()
        for path in sorted(self.staged.iterdir()):
            if path.name != MANIFEST_NAME and not path.name.endswith(".partial"):
                path.rename(self.dataset / path.name)
        sync(self.dataset)
        (self.staged / MANIFEST_NAME).rename(self.dataset / MANIFEST_NAME)
        sync(self.dataset)
        self.clear()

    def _remove_old_manifest(self) -> None:
        """Also removes the old vocabulary's file, whose name only the old manifest knows."""
        path = self.dataset / MANIFEST_NAME
        if path.exists():
            vocabulary = vocabulary_file(orjson.loads(path.read_bytes())["tokenizer"]["name"])
            path.unlink()
            (self.dataset / LISTING_NAME).unlink(missing_ok=True)
            if vocabulary:
                (self.dataset / vocabulary).unlink(missing_ok=True)
