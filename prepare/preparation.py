"""A preparation and its plan: an earlier start's if it still holds, else a new one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset.shards import MANIFEST_NAME, load_manifest
from pipeline.errors import UserError
from pipeline.files import hash_file, write_atomic
from pipeline.log import logger
from pipeline.vocabulary.tokenizer import Tokenizer, token_dtype
from prepare.assembly.finish import changed_sources
from prepare.encoding.contamination import NGRAMS_FILE, evaluation_ngrams
from prepare.encoding.encode import load
from prepare.encoding.vocabulary import is_file, learn_from, learns_from_corpus, open_vocabulary
from prepare.options import PrepareOptions, choices, default_fraction
from prepare.sources.corpus import Corpus
from prepare.unfinished.journal import Journal, Plan, Share
from prepare.units import SPLITTING
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

    def begin(self) -> Plan | None:
        """The plan to follow; None if the dataset is already prepared.

        Raises UserError if the dataset, or the plan of an earlier start, differs from what is asked
        for now.
        """
        chosen = choices(self.options, default_fraction(self.corpus.file_bytes()))
        if (self.dataset / MANIFEST_NAME).exists() and not self.options.force:
            self._check_same(chosen)
            logger.info("%s is already prepared", self.dataset)
            self.journal.clear()
            return None
        if (self.corpus.file_bytes() or WORTH_WORKERS_BYTES) >= WORTH_WORKERS_BYTES:
            self.workers.start(load)
        earlier = self.journal.plan()
        if earlier and (changes := self._changes(earlier, chosen)):
            # Without a finished unit nothing is lost by a new plan; but another task may be at work
            # on the old one.
            if (self.journal.finished_units() or self.share.tasks > 1) and not self.options.force:
                raise UserError(
                    f"{self.dataset} is half prepared, and since then {'; '.join(changes)}. Undo that to resume, "
                    "prepare under another --name, or start over with --force"
                )
            earlier = None
        if earlier is None:
            return self._new_plan(chosen)
        logger.info("resuming %s", self.dataset)
        return earlier

    def _new_plan(self, chosen: dict[str, Any]) -> Plan | None:
        # Of several tasks, another may be working in the folder already.
        if self.share.tasks == 1:
            self.journal.clear()
        name, items, limit = self.options.tokenizer, self.corpus.items(), self.options.limit_docs
        tokenizer = learn_from(items, name, limit) if learns_from_corpus(name) else open_vocabulary(name)
        if not limit:
            _check_space(self.dataset, tokenizer, self.corpus.text_bytes())
        plan = Plan(
            sources=self.options.sources,
            working_folder=str(Path.cwd()),
            options=chosen,
            stamps=self.corpus.stamps(),
            tokenizer=tokenizer.spec(),
            sizes=[item.size for item in items],
            tasks=self.share.tasks,
            splitting=SPLITTING,
        )
        if self.options.decontaminate:
            self.journal.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.journal.folder / NGRAMS_FILE, evaluation_ngrams(self.options.decontaminate).tobytes())
        self.journal.begin(plan, tokenizer.files())
        return self.journal.plan()  # another task's, if that was first

    def _check_same(self, chosen: dict[str, Any]) -> None:
        manifest = load_manifest(self.dataset)
        differences = _differences(manifest.options, chosen) or self._other_vocabulary(manifest.tokenizer)
        # Sources are compared by their content: every file is hashed again, since a finished
        # dataset keeps no stamps.
        sources = self.corpus.record(hash_file)
        if manifest.sources != sources:
            changed = [entry for entry in sources if entry not in manifest.sources] or manifest.sources
            names = [str(entry.get("path", entry.get("repository"))) for entry in changed]
            differences.append(f"the sources differ ({shortened(names)})")
        if differences:
            raise UserError(
                f"{self.dataset} was prepared differently: {'; '.join(differences)}. "
                "Prepare under another --name, or replace it with --force"
            )

    def _changes(self, earlier: Plan, chosen: dict[str, Any]) -> list[str]:
        """What has changed since `earlier` was made."""
        changed = changed_sources(earlier, self.corpus, self.journal)
        differences = _differences(earlier.options, chosen) or self._other_vocabulary(earlier.tokenizer)
        if changed:
            differences.append(f"the sources changed ({shortened(changed)})")
        if earlier.splitting != SPLITTING:
            differences.append("the program changed: this version divides the sources into other units")
        return differences

    def _other_vocabulary(self, spec: dict[str, Any]) -> list[str]:
        # Only a file may have changed: a learned vocabulary follows from the sources, and a
        # published one stays the same.
        name = self.options.tokenizer
        changed = is_file(name) and open_vocabulary(name).spec() != spec
        return [f"the vocabulary {name} has another fingerprint"] if changed else []


def shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(earlier: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {earlier.get(name)!r} and is now {value!r}"
        for name, value in chosen.items()
        # An option that is off may be missing: it is newer than what the earlier start wrote.
        if (earlier.get(name) or None) != (value or None)
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
