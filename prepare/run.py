"""Raw text in, a prepared dataset out: sources -> plan -> parts -> shards -> manifest.

All work goes on in `<dataset>/unfinished/`, and a step that is done is a file there, so the same command goes on where a
killed one was. The dataset itself appears, or takes an earlier one's place, when everything is whole.
"""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from pipeline.dataset.shards import MANIFEST_NAME, load_manifest
from pipeline.errors import UserError
from pipeline.files import Held, hash_file, one_writer
from pipeline.log import ProgressReport, logger
from pipeline.vocabulary.tokenizer import Tokenizer, token_dtype
from prepare.assembly.finish import changed_sources, finish
from prepare.encoding.encode import load
from prepare.encoding.pieces import pieces
from prepare.encoding.vocabulary import is_file, learn_vocabulary, learns_from_corpus, open_vocabulary
from prepare.encoding.work import encode_share
from prepare.options import PrepareOptions, check, choices, default_fraction
from prepare.sources.corpus import Corpus, default_name, hub_source, is_named, open_corpus
from prepare.sources.local import stamped_hash
from prepare.storage.files import is_url
from prepare.unfinished.journal import Journal, Plan, Share, tasks_of
from prepare.units import STDIN_SPOOL, LongDocument, Refused
from prepare.workers import Workers

# Hashing lets go of the interpreter's lock; two threads keep up with a disk and leave the processors to the workers.
HASH_THREADS = 2
WORTH_WORKERS_BYTES = 16_000_000
WORTH_TELLING_BYTES = 100_000_000
# A vocabulary is learnt from so much text, spread over the corpus: ten times as much changes few of its words.
LEARN_BYTES = 200_000_000
# For the estimate of what is written: with GPT-2's vocabulary English has about 4.4 bytes of text a token, code 2 to 3.
BYTES_PER_TOKEN = 2.5


def run(options: PrepareOptions) -> Path:
    """Prepare the dataset, or go on with it, unless it is there already; returns its folder."""
    started = time.monotonic()
    share = check(options)
    dataset = dataset_folder(options)
    corpus = open_corpus(options.sources, options.text_field, dataset)
    with Workers(options.workers or available_cores()) as workers:
        _run(options, share, corpus, dataset, workers)
    logger.info("took %s s", f"{time.monotonic() - started:,.1f}")
    return dataset


def dataset_folder(options: PrepareOptions) -> Path:
    return Path(options.data_dir) / (options.name or default_name((options.sources or [""])[0]))


def check_before(options: PrepareOptions, tasks: int) -> tuple[Path, list[Path]]:
    """What is known of a preparation before its `tasks` jobs start: the dataset's folder and the local sources.

    Raises UserError. What lies behind a network is not asked for, as the jobs' nodes may have another one.
    """
    if options.task_id is not None or "-" in options.sources:
        raise UserError("--task-id and stdin (-) are not for a job: SLURM numbers its tasks, and nobody feeds it text")
    check(replace(options, task_id=0, tasks=tasks))
    dataset = dataset_folder(options)
    local = [source for source in options.sources if not (hub_source(source) or is_named(source) or is_url(source))]
    if local:
        open_corpus(local, options.text_field, dataset)
    return dataset, [Path(source) for source in local]


def _run(options: PrepareOptions, share: Share, corpus: Corpus, dataset: Path, workers: Workers) -> None:
    if Journal(dataset).is_publishing():
        with one_writer(dataset):
            Journal(dataset).finish_publishing()
    if share.tasks == 1:
        with one_writer(dataset):
            try:
                if plan := _begin(options, share, corpus, dataset, workers):
                    _encode(plan, share, corpus, dataset, workers)
                    finish(Journal(dataset), plan, corpus, workers)
            finally:
                (dataset / STDIN_SPOOL).unlink(missing_ok=True)
        return
    with one_writer(dataset, shared=True), one_writer(dataset, f".lock_{share.task:04d}"):
        if plan := _begin(options, share, corpus, dataset, workers):
            _encode(plan, share, corpus, dataset, workers)
    if plan:
        _finish_if_last(plan, share, corpus, dataset, workers)


def merge(dataset: Path, workers: int | None = None) -> None:
    """Make the dataset of what all tasks have done."""
    dataset = dataset.absolute()
    journal = Journal(dataset)
    plan = journal.plan()
    if plan is None:
        load_manifest(dataset)
        logger.info("%s is already whole", dataset)
        return
    with one_writer(dataset), chdir(plan.working_folder), Workers(workers or available_cores()) as pool:
        corpus = open_corpus(plan.sources, plan.options["text_field"], dataset)
        _check_complete(journal, plan)
        finish(journal, plan, corpus, pool)


def _begin(options: PrepareOptions, share: Share, corpus: Corpus, dataset: Path, workers: Workers) -> Plan | None:
    """The plan to follow, an earlier start's where there is one; None where the dataset is whole already."""
    journal = Journal(dataset)
    fraction = options.val_fraction or default_fraction(corpus.file_bytes())
    chosen = choices(options, fraction)
    if (dataset / MANIFEST_NAME).exists() and not options.force:
        _check_same(dataset, chosen, options.tokenizer, corpus)
        logger.info("%s is already prepared", dataset)
        journal.clear()
        return None
    # Below this much text it takes longer to start processes than to do without.
    if (corpus.file_bytes() or WORTH_WORKERS_BYTES) >= WORTH_WORKERS_BYTES:
        workers.start(load)
    before = journal.plan()
    if before and (changes := _changes(before, chosen, options.tokenizer, corpus, journal)):
        if (journal.finished_units() or share.tasks > 1) and not options.force:
            raise UserError(
                f"{dataset} is half prepared, and since then {'; '.join(changes)}. Restore that to go on, "
                "prepare under another --name, or start over with --force"
            )
        before = None
    if before is None:
        if share.tasks == 1:
            journal.clear()
        tokenizer = _vocabulary(options.tokenizer, corpus, options.limit_docs)
        if not options.limit_docs:
            _check_space(dataset, tokenizer, corpus.text_bytes())
        sizes = [item.size for item in corpus.items()]
        plan = Plan(options.sources, str(Path.cwd()), chosen, corpus.stamps(), tokenizer.spec(), sizes, share.tasks)
        journal.begin(plan, tokenizer.files())
        return journal.plan()
    logger.info("going on with %s", dataset)
    return before


def _differences(
    before: dict[str, Any], tokenizer: dict[str, Any], chosen: dict[str, Any], vocabulary: str
) -> list[str]:
    """In which options, or in what vocabulary, an earlier preparation differs from the one that is wanted."""
    found = [
        f"{name} is {before.get(name)!r} there and {value!r} here"
        for name, value in chosen.items()
        if before.get(name) != value
    ]
    # A learnt vocabulary follows from the sources, a published one does not change; a file may have.
    if not found and is_file(vocabulary) and open_vocabulary(vocabulary).spec() != tokenizer:
        found.append(f"the vocabulary {vocabulary} has another fingerprint")
    return found


def _check_same(dataset: Path, chosen: dict[str, Any], vocabulary: str, corpus: Corpus) -> None:
    manifest = load_manifest(dataset)
    differences = _differences(manifest.options, manifest.tokenizer, chosen, vocabulary)
    sources = corpus.record(hash_file)
    if manifest.sources != sources:
        changed = [entry for entry in sources if entry not in manifest.sources] or manifest.sources
        names = [str(entry.get("path", entry.get("repository"))) for entry in changed]
        differences.append(f"the sources differ ({_some(names)})")
    if differences:
        raise UserError(
            f"{dataset} was prepared otherwise: {'; '.join(differences)}. "
            "Prepare under another --name, or replace it with --force"
        )


def _changes(before: Plan, chosen: dict[str, Any], vocabulary: str, corpus: Corpus, journal: Journal) -> list[str]:
    """What is not as it was when the preparation began."""
    changed = changed_sources(before, corpus, journal)
    differences = _differences(before.options, before.tokenizer, chosen, vocabulary)
    return differences + ([f"the sources changed ({_some(changed)})"] if changed else [])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_space(dataset: Path, tokenizer: Tokenizer, text_bytes: int) -> None:
    """Parts and shards lie side by side at the end, so the ids need twice their room. Raises UserError where it lacks."""
    tokens = text_bytes / (1.0 if tokenizer.name in ("char", "byte") else BYTES_PER_TOKEN)
    needed = 2 * tokens * token_dtype(tokenizer.vocab_size).itemsize
    free = shutil.disk_usage(dataset).free
    if needed > WORTH_TELLING_BYTES:
        logger.info(
            "%s MB of text; needs about %s MB of disk while it runs and half of it after, %s MB are free",
            *(f"{amount / 1e6:,.0f}" for amount in (text_bytes, needed, free)),
        )
    if free < needed:
        raise UserError(
            f"{dataset} has {free / 1e6:,.0f} MB free, and about {needed / 1e6:,.0f} MB are needed: make room, "
            "or choose another place with --data-dir"
        )


def _vocabulary(name: str, corpus: Corpus, limit: int | None) -> Tokenizer:
    if not learns_from_corpus(name):
        return open_vocabulary(name)
    # Every document of `char`, since a character that is not learnt could not be encoded.
    one_in = 1 if name == "char" or limit else -(-corpus.text_bytes() // LEARN_BYTES) or 1
    with ProgressReport(f"learn the vocabulary {name}", corpus.text_bytes() / 1e6, "MB") as report:
        return learn_vocabulary(name, _texts(corpus, limit, one_in, report))


def _texts(corpus: Corpus, limit: int | None, one_in: int, report: ProgressReport) -> Iterator[str]:
    """The text of the first `limit` documents, piece by piece; only of one in so many, chosen by their beginnings."""
    taken = 0
    for unit in (unit for item in corpus.items() for unit in item.units()):
        for _, document in unit.documents():
            if isinstance(document, Refused):
                continue
            head = next(_blocks(document), b"")
            if one_in > 1 and xxhash.xxh3_64_intdigest(head) % one_in:
                continue
            with suppress(UnicodeDecodeError):  # found by the encoder too, which counts it
                yield from (piece for piece, _ in pieces(_blocks(document)))
                taken += bool(head)
            if taken == limit:
                return
        report.advance(unit.size / 1e6)


def _blocks(document: bytes | LongDocument) -> Iterator[bytes]:
    return iter([document]) if isinstance(document, bytes) else document.blocks()


def _encode(plan: Plan, share: Share, corpus: Corpus, dataset: Path, workers: Workers) -> None:
    """Encode this task's units; its share of the sources' files is hashed meanwhile."""
    journal = Journal(dataset)
    known = journal.known_hashes()
    paths = [path for path in corpus.files()[share.task :: share.tasks] if str(path) not in known]
    with ThreadPoolExecutor(HASH_THREADS) as hashing, ThreadPoolExecutor(1) as noting:
        noted = noting.submit(journal.note_hashes, paths, share.task, hashing.map(stamped_hash, paths))
        try:
            encode_share(journal, plan, corpus.items(), share, workers)
            noted.result()
        finally:
            hashing.shutdown(cancel_futures=True)


def _finish_if_last(plan: Plan, share: Share, corpus: Corpus, dataset: Path, workers: Workers) -> None:
    """The task that can hold the dataset alone, because no other is at work, sees whether everything is there."""
    journal = Journal(dataset)
    try:
        with one_writer(dataset):
            if journal.plan() is None:  # another task has made the dataset
                return
            if not journal.incomplete_items(plan):
                finish(journal, plan, corpus, workers)
                return
    except Held:
        pass
    logger.info("task %d of %d is done; the last one makes the dataset, or `pipeline merge %s`", *share, dataset)


def _check_complete(journal: Journal, plan: Plan) -> None:
    missing = journal.incomplete_items(plan)
    if missing:
        tasks = sorted({tasks_of(plan.sizes, plan.tasks)[item] for item in missing})
        raise UserError(
            f"{journal.dataset} is not complete: {len(missing)} of {len(plan.sizes)} pieces of the corpus are missing; "
            f"run the same command again for --task-id {_some([str(task) for task in tasks])} of --tasks {plan.tasks}"
        )


def available_cores() -> int:
    """The cores this process may use, which under SLURM are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
