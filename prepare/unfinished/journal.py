"""The state of a preparation is files in `<dataset>/unfinished/` alone: it survives any kill.

    plan.json           what is prepared, from what, and how; written first, by the first task
    files.json          the source files as they were listed last
    KEY_000000.part     a finished unit of the item KEY
    hashes_0000.jsonl   hashes of the source files, one file per task
    distrusted_NAME     exists once the library NAME was found at fault; holds the fault
    evaluation_ngrams   of the texts to keep out (--decontaminate)
    assembled           hash of the parts' names and the options that the staged shards are made of
    dataset/            shards and vocabulary while they are made; the manifest is written last

A KEY follows from everything its units are cut from (`sources/items.py`), so a source file that
changes leaves the parts of all others as they are. Once `dataset/manifest.json` exists, all that is
left is to move those files up, which can be repeated after any kill.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.files import hash_bytes, sync, unique, write_atomic
from pipeline.vocabulary.tokenizer import token_dtype
from prepare.storage.files import StoredFile
from prepare.unfinished.parts import Summary, Wanted, part_name, read_summary

_PART_NAME = re.compile(r"([0-9a-f]{32})_(\d{6,})\.(part|first_\d+)")
# Another task may be writing the plan where the file system has no hard links.
PLAN_ATTEMPTS = 20


class Share(NamedTuple):
    """The items that fall to one of `tasks` programs, such as the jobs of a SLURM array."""

    task: int
    tasks: int

    def items(self, sizes: list[int]) -> list[int]:
        """The numbers of its items: neighbours, as one machine reads the units of a file best."""
        return [item for item, task in enumerate(tasks_of(sizes, self.tasks)) if task == self.task]


def tasks_of(sizes: list[int], tasks: int) -> list[int]:
    """The task of each item of `sizes` bytes, so that all tasks have about the same bytes."""
    # An item belongs to the task whose equal share of all bytes contains the item's middle. One
    # byte is added to each item, so that empty ones spread as well.
    ends = list(accumulate(size + 1 for size in sizes))
    return [(2 * end - size - 1) * tasks // (2 * ends[-1]) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class Plan:
    """What determines a dataset's bytes, next to the content of its sources.

    `unit_bytes` is that of the first start: it depends on the corpus's size, and a file that is
    added must not divide the others anew. `constants` are the program's that the division follows
    from; a plan of another format, or a damaged one, has none.
    """

    sources: list[str] = field(default_factory=list)
    working_folder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    tasks: int = 0
    unit_bytes: int = 0
    constants: dict[str, int] = field(default_factory=dict)
    bad_rows: str | None = None

    def wanted(self) -> Wanted:
        """Counts the documents up to `limit_docs`: with `dedup`, those that are left."""
        distinct = token_dtype(self.tokenizer["vocab_size"]) if self.options["dedup"] else None
        return Wanted(self.options["limit_docs"], distinct)


class ListedPart(NamedTuple):
    """A part in corpus order, the number of its source, and its first `documents` that are wanted."""

    path: Path
    source: int
    summary: Summary
    documents: int


Finished = dict[str, dict[int, Summary]]


def is_complete(units: dict[int, Summary]) -> bool:
    """Whether an item's finished units are all its units: only the last one tells how many."""
    highest = max(units, default=-1)
    return len(units) == highest + 1 > 0 and units[highest].last


class Journal:
    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.folder = dataset / "unfinished"
        self.staged = self.folder / "dataset"

    # ---- the plan

    def plan(self) -> Plan | None:
        path, document = self.folder / "plan.json", {}
        if not path.exists():
            return None
        for _ in range(PLAN_ATTEMPTS):
            with suppress(ValueError):
                document = json.loads(path.read_bytes())
                break
            time.sleep(0.05)
        return Plan(**{each.name: document[each.name] for each in fields(Plan) if each.name in document})

    def begin(self, plan: Plan, vocabulary: dict[str, bytes], files: list[StoredFile]) -> None:
        """Write the plan, unless another task has written one first."""
        self.staged.mkdir(parents=True, exist_ok=True)
        for name, content in vocabulary.items():
            write_atomic(self.staged / name, content)
        self.note_files(files)
        content = dump(asdict(plan))
        mine = self.folder / f"plan.{unique()}"
        write_atomic(mine, content)
        try:
            # link(2) fails if the name exists, where rename(2) would replace the plan of the task
            # that was first.
            (self.folder / "plan.json").hardlink_to(mine)
        except FileExistsError:
            return
        except OSError:  # exFAT, some network and FUSE file systems have no hard links
            with suppress(FileExistsError), (self.folder / "plan.json").open("xb") as file:
                file.write(content)
        finally:
            mine.unlink()
        sync(self.folder)

    def replace_plan(self, plan: Plan) -> None:
        write_atomic(self.folder / "plan.json", dump(asdict(plan)))

    def clear(self) -> None:
        """Remove everything."""
        # Renamed first: parts that a kill left without their plan would count for the next.
        with suppress(FileNotFoundError):
            self.folder.rename(self.dataset / f".unfinished.{unique()}")
        for leftover in self.dataset.glob(".unfinished.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def remove_partial(self) -> None:
        """Remove what killed processes were writing; the caller knows that no other is at work."""
        for path in self.folder.glob("*.partial"):
            path.unlink()

    # ---- the source files

    def files(self) -> dict[str, StoredFile]:
        """By path, as they were listed last; empty if that is not known."""
        with suppress(OSError, ValueError):
            return {
                path: StoredFile(path, *stamp) for path, *stamp in json.loads((self.folder / "files.json").read_bytes())
            }
        return {}

    def note_files(self, files: list[StoredFile]) -> None:
        write_atomic(self.folder / "files.json", dump([astuple(file) for file in files]))

    def known_hashes(self) -> dict[StoredFile, str]:
        """The hash of every source file that any task has hashed. A line truncated by a kill is
        skipped.
        """
        found = {}
        for path in sorted(self.folder.glob("hashes_*.jsonl")):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError):
                    *stamp, digest = json.loads(line)
                    found[StoredFile(*stamp)] = digest
        return found

    def note_hashes(self, task: int, hashes: Iterable[tuple[StoredFile, str]]) -> None:
        """Append each hash as it arrives."""
        with (self.folder / f"hashes_{task:04d}.jsonl").open("ab") as file:
            for stored, digest in hashes:
                file.write(dump([stored.path, stored.size, stored.etag, digest]) + b"\n")
                file.flush()

    # ---- parts

    def finished(self) -> Finished:
        """Item -> its finished units.

        Once a library is at fault, the parts it encoded are removed and do not count.
        """
        found: Finished = {}
        distrusted = self.distrusted()
        for entry in os.scandir(self.folder):
            name = _PART_NAME.fullmatch(entry.name)
            with suppress(FileNotFoundError):  # of a library at fault, which another task has removed
                if name and (summary := read_summary(Path(entry.path))).engine in distrusted:
                    Path(entry.path).unlink()
                elif name and name[3] == "part":
                    found.setdefault(name[1], {})[int(name[2])] = summary
        return found

    def parts(self, keys: Iterable[tuple[str, int]], wanted: Wanted) -> list[ListedPart]:
        """The parts of the items (key, number of the source), up to the one that reaches the limit."""
        found = self.finished()
        listed: list[ListedPart] = []
        for key, source in keys:
            if wanted.is_full():  # the next item need not have parts
                return listed
            for unit, summary in sorted(found[key].items()):
                if wanted.is_full():
                    return listed
                path = self.folder / part_name(key, unit)
                taken = wanted.take(path, summary.documents)
                if taken < summary.documents:
                    path = self.folder / part_name(key, unit, first=taken)
                listed.append(ListedPart(path, source, summary, taken))
        return listed

    def incomplete_items(self, keys: list[tuple[str, int]]) -> list[int]:
        found = self.finished()
        return [number for number, (key, _) in enumerate(keys) if not is_complete(found.get(key, {}))]

    def count_stale(self, keys: Set[str], *, remove: bool) -> tuple[int, int]:
        """How many finished units belong to other items than these, and how many to these."""
        stale = kept = 0
        for path in list(self.folder.glob("*.part")):
            is_kept = path.name.partition("_")[0] in keys
            kept, stale = kept + is_kept, stale + (not is_kept)
            if remove and not is_kept:
                path.unlink()
        return stale, kept

    # ---- libraries at fault

    def distrust(self, library: str, fault: str) -> None:
        write_atomic(self.folder / f"distrusted_{library}", fault.encode())

    def distrusted(self) -> set[str]:
        return {path.name.removeprefix("distrusted_") for path in self.folder.glob("distrusted_*")}

    # ---- assembly

    def assemble(self, parts: list[Path], options: dict[str, Any]) -> None:
        """Remove staged shards that a killed run made of other parts, or split otherwise."""
        made_of = hash_bytes(dump([[path.name for path in parts], options]))
        mark = self.folder / "assembled"
        if not mark.exists() or mark.read_text(encoding="ascii") != made_of:
            for path in self.staged.glob("*.bin"):
                path.unlink()
            sync(self.staged)
            write_atomic(mark, made_of.encode())


def dump(value: Any) -> bytes:
    """As JSON in ASCII: a path that is not UTF-8 has surrogates, which orjson refuses."""
    return json.dumps(value).encode()
