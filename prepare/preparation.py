"""A preparation and its plan: an earlier start's if it still holds, else a new one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from pipeline.dataset.shards import MANIFEST_NAME, SPLITS, load_manifest
from pipeline.errors import UserError
from pipeline.files import hash_file, write_atomic
from pipeline.log import logger
from pipeline.vocabulary.tokenizer import Tokenizer, token_dtype
from prepare import documents, units
from prepare.encoding import pieces
from prepare.encoding.contamination import NGRAMS_FILE, evaluation_ngrams
from prepare.encoding.encode import load
from prepare.encoding.vocabulary import is_file, learn_from, learns_from_corpus, open_vocabulary
from prepare.options import PrepareOptions, choices, settled
from prepare.sources import items
from prepare.sources.corpus import Corpus, Snapshot
from prepare.storage.files import StoredFile, local_file, shown
from prepare.unfinished.journal import Journal, Plan, Share
from prepare.unfinished.parts import merge_reports
from prepare.unfinished.publishing import check_free, prepared_hashes
from prepare.units import unit_bytes
from prepare.workers import Workers

# Below this much text, starting worker processes takes longer than encoding in this one.
WORTH_WORKERS_BYTES = 16_000_000
WORTH_LOGGING_BYTES = 100_000_000
# To estimate the disk space: with GPT-2's vocabulary English has about 4.4 bytes of text per token,
# code 2 to 3.
BYTES_PER_TOKEN = 2.5


@dataclass(frozen=True)
class Preparation:
    """What to prepare, this task's share of it, the text, the state on disk, the processes."""

    options: PrepareOptions
    share: Share
    corpus: Corpus
    journal: Journal
    workers: Workers

    @property
    def dataset(self) -> Path:
        return self.journal.dataset

    def begin(self) -> tuple[Plan, Snapshot] | None:
        """The plan to follow, and the corpus divided by it; None if the dataset is already prepared.

        Raises UserError if the dataset, or the plan of an earlier start, differs from what is asked
        for now.
        """
        if (self.dataset / MANIFEST_NAME).exists() and not self.options.force:
            self._check_same()
            logger.info("%s is already prepared", self.dataset)
            self.journal.clear()
            return None
        for reason, entry in merge_reports(source.passed_over for source in self.corpus.sources).items():
            logger.info("not read: %s: %s (such as %s)", reason, f"{entry['count']:,}", entry["example"])
        check_free(self.journal, [f"{split}_00000.bin" for split in SPLITS])
        if (self.corpus.file_bytes() or WORTH_WORKERS_BYTES) >= WORTH_WORKERS_BYTES:
            self.workers.start(load)
        earlier = self.journal.plan()
        if earlier and (changes := self._changes(earlier)):
            # Without a finished unit nothing is lost by a new plan; but another task may be at work
            # on the old one.
            if (any(self.journal.folder.glob("*.part")) or self.share.tasks > 1) and not self.options.force:
                raise self._half_prepared(changes)
            earlier = None
        snapshot = self._resume(earlier) if earlier else None
        if earlier is None or snapshot is None:
            earlier, snapshot = self._new_plan()
        if self.options.decontaminate:  # the same for every task and every start
            write_atomic(self.journal.folder / NGRAMS_FILE, evaluation_ngrams(self.options.decontaminate).tobytes())
        return replace(earlier, options=settled(earlier.options, self.corpus.file_bytes())), snapshot

    def _snapshot(self, unit_bytes: int) -> Snapshot:
        return Snapshot(self.corpus, unit_bytes, as_known(self.journal.known_hashes()))

    def _resume(self, plan: Plan) -> Snapshot | None:
        """The corpus as it is now; what has changed in it since it was last listed is reported.

        None if the vocabulary that is learned from it has become another.
        """
        snapshot = self._snapshot(plan.unit_bytes)
        if changes := _changed_files(self.journal.files(), snapshot.files):
            if not self._learns_the_same(plan):
                logger.info("%s: the vocabulary learned from the sources changes, all is encoded again", changes)
                return None
            keys = {key for key, _ in snapshot}
            stale, kept = self.journal.count_stale(keys, remove=self.share.tasks == 1)
            logger.info(
                "%s: %d finished units no longer count and are encoded again, %d are kept", changes, stale, kept
            )
            self.journal.note_files(snapshot.files)
        if plan.sources != self.options.sources or plan.bad_rows != self.options.bad_rows:
            self.journal.replace_plan(replace(plan, sources=self.options.sources, bad_rows=self.options.bad_rows))
        logger.info("resuming %s", self.dataset)
        return snapshot

    def _learns_the_same(self, plan: Plan) -> bool:
        same = not learns_from_corpus(self.options.tokenizer) or _spec(self._vocabulary()) == plan.tokenizer
        if not same and self.share.tasks > 1:
            raise self._half_prepared(["the sources changed, and with them the vocabulary learned from them"])
        return same

    def _vocabulary(self) -> Tokenizer:
        name = self.options.tokenizer
        if not learns_from_corpus(name):
            return open_vocabulary(name)
        # Where documents are left out, the limit reaches beyond the first ones, to other characters.
        leaves_out = self.options.dedup or self.options.decontaminate
        return learn_from(self.corpus.items(), name, None if leaves_out else self.options.limit_docs)

    def _new_plan(self) -> tuple[Plan, Snapshot]:
        # Of several tasks, another may be working in the folder already.
        if self.share.tasks == 1:
            self.journal.clear()
        snapshot = self._snapshot(unit_bytes(self.corpus.file_bytes() or 0))
        tokenizer = self._vocabulary()
        if not self.options.limit_docs:
            _check_space(self.dataset, tokenizer, snapshot.text_bytes())
        mine = Plan(
            sources=self.options.sources,
            working_folder=str(Path.cwd()),
            options=choices(self.options),
            tokenizer=_spec(tokenizer),
            tasks=self.share.tasks,
            unit_bytes=unit_bytes(self.corpus.file_bytes() or 0),
            constants=constants(),
            bad_rows=self.options.bad_rows,
        )
        self.journal.begin(mine, tokenizer.files(), snapshot.files)
        plan = self.journal.plan()  # another task's, if that was first
        assert plan is not None
        if changes := self._changes(plan):
            raise self._half_prepared(changes)
        return plan, self._snapshot(plan.unit_bytes)

    def _check_same(self) -> None:
        manifest = load_manifest(self.dataset)
        chosen = settled(choices(self.options), self.corpus.file_bytes())
        differences = _differences(manifest.options, chosen) or self._other_vocabulary(manifest.tokenizer)
        # Sources are compared by their content, but a file is read only if its size or its time is
        # another than when it was prepared.
        known = prepared_hashes(self.dataset)
        by_path = {file.path: digest for file, digest in known.items()}

        def hash_of(path: Path) -> str:
            if not path.exists() and str(path) in by_path:  # no longer in the cache of the Hub
                return by_path[str(path)]
            return known.get(local_file(path)) or hash_file(path)

        sources = self.corpus.record(hash_of)
        advice = "Prepare under another --name, or replace it with --force"
        if manifest.sources != sources:
            changed = [entry for entry in sources if entry not in manifest.sources] or manifest.sources
            names = [str(entry.get("path", entry.get("repository"))) for entry in changed]
            differences.append(f"the sources differ ({shortened(names)})")
            advice = (
                "Prepare the new files alone under another --name and train on both (data.mixture), or replace the "
                "dataset with --force"
            )
        if differences:
            raise UserError(f"{self.dataset} was prepared differently: {'; '.join(differences)}. {advice}")

    def _half_prepared(self, changes: list[str]) -> UserError:
        return UserError(
            f"{self.dataset} is half prepared, and since then {'; '.join(changes)}. Undo that to resume, "
            "prepare under another --name, or start over with --force"
        )

    def _changes(self, earlier: Plan) -> list[str]:
        """What has changed since `earlier` was made, next to the content of the sources."""
        if not earlier.constants:
            return ["another version of the program began it, or plan.json is damaged"]
        size = self.corpus.file_bytes()
        differences = _differences(settled(earlier.options, size), settled(choices(self.options), size))
        # A task's share of the work follows from their number; and all of them read the same sources.
        if self.share.tasks > 1 or earlier.tasks > 1:
            mine = {"tasks": self.share.tasks, "sources": self.options.sources}
            differences += _differences({"tasks": earlier.tasks, "sources": earlier.sources}, mine)
        differences += [f"the program changed: {each}" for each in _differences(earlier.constants, constants())]
        return differences or self._other_vocabulary(earlier.tokenizer)

    def _other_vocabulary(self, spec: dict[str, Any]) -> list[str]:
        # Only a file may have changed: a learned vocabulary follows from the sources, and a
        # published one stays the same.
        name = self.options.tokenizer
        changed = is_file(name) and _spec(open_vocabulary(name)) != spec
        return [f"the vocabulary {name} has another fingerprint"] if changed else []


def constants() -> dict[str, int]:
    """The program's constants by which files are divided, and long documents encoded, by name."""
    formats = [import_module(f"prepare.documents.{module.name}") for module in iter_modules(documents.__path__)]
    return {
        f"{module.__name__.removeprefix('prepare.')}.{name}": value
        for module in (units, items, pieces, *formats)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int)
    }


def as_known(known: dict[StoredFile, str]) -> Callable[[StoredFile], StoredFile]:
    """A file -> the first record of a file of its path, size and hash, or itself: one that was only
    touched has not changed.
    """
    earlier: dict[tuple[str, int], list[StoredFile]] = {}
    for file in known:
        earlier.setdefault((file.path, file.size), []).append(file)

    def find(file: StoredFile) -> StoredFile:
        records = earlier.get((file.path, file.size), [])
        if not records or records[0] == file:
            return file
        # Size and time are cheap to compare; only where the time differs is a file read.
        digest = known.get(file) or hash_file(Path(file.path))
        return next((record for record in records if known[record] == digest), file)

    return find


def _changed_files(before: dict[str, StoredFile], files: list[StoredFile]) -> str:
    """What has changed among the files, in words; empty if nothing has, or it is not known."""
    if not before:
        return ""
    now = {file.path: file for file in files}
    both = before.keys() & now.keys()
    groups = {
        "changed": {path for path in both if before[path] != now[path]},
        "is new": now.keys() - both,
        "was removed": before.keys() - both,
    }
    return ", ".join(f"{shortened(sorted(map(shown, paths)))} {what}" for what, paths in groups.items() if paths)


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    spec = tokenizer.spec()
    return {**spec, "name": shown(spec["name"])}  # a file's name need not be UTF-8


def shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(earlier: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {was!r} and is now {chosen.get(name)!r}"
        for name in {**chosen, **earlier}
        # An option that an earlier version did not have was at its default; what is off may be null.
        if (was := earlier.get(name, getattr(PrepareOptions, name, None))) != chosen.get(name)
        and (was or chosen.get(name))
    ]


def _check_space(dataset: Path, tokenizer: Tokenizer, text_bytes: int) -> None:
    """Raises UserError if the disk is too small.

    At the end parts and shards exist together, so it needs room for the ids twice.
    """
    tokens = text_bytes / (1.0 if tokenizer.name in ("char", "byte") else BYTES_PER_TOKEN)
    needed = 2 * tokens * token_dtype(tokenizer.vocab_size).itemsize
    free = shutil.disk_usage(dataset).free
    if needed > WORTH_LOGGING_BYTES:
        logger.info(
            "%s MB of text: needs about %s MB of disk while it runs and half of that afterwards, %s MB are free",
            *(f"{amount / 1e6:,.0f}" for amount in (text_bytes, needed, free)),
        )
    if free < needed:
        raise UserError(
            f"{dataset} has {free / 1e6:,.0f} MB free, expected about {needed / 1e6:,.0f} MB: free some space, "
            "or choose another folder with --data-dir"
        )
