"""The state of a preparation, in `<dataset>/unfinished/`: files alone, so that a kill at any moment leaves a state too.

    plan.json          what is prepared, from what, and how; written first, by whichever task comes first
    000012_000000.part a finished unit
    hashes_0000.jsonl  the sources' files that were hashed, by task
    tiktoken_only      there when gigatoken was caught at a fault, with the fault
    dataset/           shards and vocabulary as they will lie in the dataset; its manifest is written last

Once `dataset/manifest.json` is there all that is left is to move those files up, which can be done again and again.
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

from pipeline.dataset.shards import MANIFEST_NAME, Manifest
from pipeline.files import sync, write_atomic
from pipeline.vocabulary.specs import vocabulary_file
from prepare.unfinished.parts import part_name, read_summary

SHARD_NAME = re.compile(r"(train|val)_\d{5,}\.bin")


class Share(NamedTuple):
    """One task's part of the work, of `tasks` that do not talk to each other."""

    task: int
    tasks: int

    def items(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of its items: neighbours, since one file's units are read best by one machine."""
        return [item for item, task in enumerate(tasks_of(sizes, self.tasks)) if task == self.task]


def tasks_of(sizes: Sequence[int], tasks: int) -> list[int]:
    """Each item's task: about the same bytes for all."""
    ends = list(accumulate(size + 1 for size in sizes))
    return [(2 * end - size - 1) * tasks // (2 * ends[-1]) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class Plan:
    """What determines the bytes, and where it came from. `sizes` are the items' bytes; `stamps` tell a changed source."""

    sources: list[str]
    working_folder: str
    options: dict[str, Any]
    stamps: dict[str, Any]
    tokenizer: dict[str, Any]
    sizes: list[int]
    tasks: int


class Journal:
    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.folder = dataset / "unfinished"
        self.staged = self.folder / "dataset"

    # ---- the plan

    def plan(self) -> Plan | None:
        path = self.folder / "plan.json"
        return Plan(**load_document(path)) if path.exists() else None

    def begin(self, plan: Plan, vocabulary: dict[str, bytes]) -> None:
        """Write the plan, unless another task was first."""
        self.staged.mkdir(parents=True, exist_ok=True)
        for name, content in vocabulary.items():
            write_atomic(self.staged / name, content)
        mine = self.folder / f"plan.{os.uname().nodename}.{os.getpid()}"
        write_atomic(mine, orjson.dumps(asdict(plan)))
        try:
            (self.folder / "plan.json").hardlink_to(mine)  # unlike a rename, it never replaces
        except FileExistsError:
            return
        finally:
            mine.unlink()
        sync(self.folder)

    def clear(self) -> None:
        """Forget everything, all at once: parts that a kill left without their plan would be taken for another's."""
        with suppress(FileNotFoundError):
            self.folder.rename(self.dataset / f".unfinished.{os.uname().nodename}.{os.getpid()}")
        for left in self.dataset.glob(".unfinished.*"):
            shutil.rmtree(left, ignore_errors=True)

    # ---- parts

    def finished_units(self) -> dict[int, set[int]]:
        """The units that are done, by item. What gigatoken did does not count after its fault."""
        found: dict[int, set[int]] = {}
        distrusted = self.distrusted()
        for entry in os.scandir(self.folder):
            if not entry.name.endswith(".part"):
                continue
            if distrusted and read_summary(Path(entry.path)).engine == "gigatoken":
                Path(entry.path).unlink(missing_ok=True)
                continue
            item, unit = entry.name.removesuffix(".part").split("_")
            found.setdefault(int(item), set()).add(int(unit))
        return found

    def is_complete(self, item: int, units: set[int]) -> bool:
        """Whether all units of an item are among these."""
        highest = max(units, default=-1)
        return len(units) == highest + 1 > 0 and read_summary(self.folder / part_name(item, highest)).last

    def parts(self, items: int, limit: int | None) -> list[Path]:
        """The parts in the corpus's order, which have to be there; with a limit, up to the document that reaches it."""
        found = self.finished_units()
        names = (part_name(item, unit) for item in range(items) for unit in sorted(found[item]))
        if limit is None:
            return [self.folder / name for name in names]
        paths: list[Path] = []
        documents = 0
        while documents < limit and (name := next(names, None)):
            paths.append(self.folder / name)
            documents += read_summary(paths[-1]).documents
        return paths

    def incomplete_items(self, plan: Plan) -> list[int]:
        found = self.finished_units()
        return [item for item in range(len(plan.sizes)) if not self.is_complete(item, found.get(item, set()))]

    # ---- gigatoken

    def distrust(self, fault: str) -> None:
        write_atomic(self.folder / "tiktoken_only", fault.encode())

    def distrusted(self) -> bool:
        return (self.folder / "tiktoken_only").exists()

    # ---- hashes of the sources' files

    def known_hashes(self) -> dict[str, tuple[Any, str]]:
        """By path, of every task: the stamp the file had and its hash. A line that a kill cut is left out."""
        found = {}
        for path in self.folder.glob("hashes_*.jsonl"):
            for line in path.read_bytes().splitlines():
                with suppress(orjson.JSONDecodeError):
                    name, stamp, digest = orjson.loads(line)
                    found[name] = (stamp, digest)
        return found

    def note_hashes(self, paths: list[Path], task: int, hashes: Iterator[tuple[Any, str]]) -> None:
        """Keep each path's stamp and hash as they come."""
        with (self.folder / f"hashes_{task:04d}.jsonl").open("ab") as file:
            for path, (stamp, digest) in zip(paths, hashes, strict=True):
                file.write(orjson.dumps([str(path), stamp, digest]) + b"\n")
                file.flush()

    # ---- the end

    def is_publishing(self) -> bool:
        return (self.staged / MANIFEST_NAME).exists()

    def publish(self, manifest: Manifest) -> None:
        manifest.save(self.staged)
        self.finish_publishing()

    def finish_publishing(self) -> None:
        """Put the staged dataset in the place of what is there: the old manifest goes first, the new one comes last.

        For one that holds the dataset alone.
        """
        if not self.is_publishing():
            return
        sync(self.staged)
        manifest = load_document(self.staged / MANIFEST_NAME)
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
        """With the file of its vocabulary, which no other file names."""
        path = self.dataset / MANIFEST_NAME
        if path.exists():
            vocabulary = vocabulary_file(load_document(path)["tokenizer"]["name"])
            path.unlink()
            if vocabulary:
                (self.dataset / vocabulary).unlink(missing_ok=True)


def load_document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(path.read_bytes())
    return document
