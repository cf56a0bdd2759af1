"""Raw text -> a prepared dataset: sources -> plan -> parts -> shards -> manifest.

All work happens in `<dataset>/unfinished/`, and each finished step is a file there, so running the
same command again resumes where a killed run stopped. The dataset itself appears, or replaces an
earlier one, once it is complete.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from pipeline.files import Held, hash_file, one_writer
from pipeline.log import logger
from prepare.assembly.finish import finish
from prepare.encoding.work import Items, encode_items
from prepare.options import STOP, PrepareOptions, check, settled
from prepare.preparation import Preparation, as_known, shortened
from prepare.sources.corpus import Corpus, Snapshot, open_corpus
from prepare.sources.names import default_name, hub_source, is_named, without_file_protocol
from prepare.storage.files import StoredFile, is_url, local_file
from prepare.unfinished.journal import Journal, Plan, Share, tasks_of
from prepare.unfinished.publishing import finish_publishing, is_publishing
from prepare.units import STDIN_SPOOL
from prepare.workers import Workers, available_cores

# How often a preparation follows sources that change while it reads them.
MOST_ROUNDS = 5
# Hashing releases the interpreter lock; two threads keep up with a disk and leave the cores to the
# workers.
HASH_THREADS = 2


def run(options: PrepareOptions) -> Path:
    """Prepare the dataset, or resume it, unless it is already prepared; returns its folder."""
    started = time.monotonic()
    share = check(options)
    _check_working_folder()
    dataset = dataset_folder(options)
    corpus = open_corpus(options.sources, options.reading, dataset)
    corpus.check_split(options.split)
    with Workers(options.workers or available_cores()) as workers:
        preparation = Preparation(options, share, corpus, journal=Journal(dataset), workers=workers)
        if is_publishing(preparation.journal):  # a kill interrupted it after all work was done
            with one_writer(dataset):
                finish_publishing(preparation.journal)
        if share.tasks == 1:
            _run_alone(preparation)
        else:
            _run_task(preparation)
    logger.info("took %s s", f"{time.monotonic() - started:,.1f}")
    return dataset


def merge(dataset: Path, workers: int | None = None) -> None:
    """Make the dataset from the parts of all tasks."""
    _check_working_folder()
    dataset = dataset.absolute()
    journal = Journal(dataset)
    plan = journal.plan()
    if plan is None:
        load_manifest(dataset)
        logger.info("%s is already prepared", dataset)
        return
    if not plan.constants:
        raise UserError(
            f"{journal.folder / 'plan.json'} is damaged: run the tasks again, after removing {journal.folder}"
        )
    if not Path(plan.working_folder).is_dir():
        raise UserError(f"{plan.working_folder}, in which the tasks ran, no longer exists: create it again")
    # The sources are named relative to the folder in which the tasks ran.
    with one_writer(dataset), chdir(plan.working_folder), Workers(workers or available_cores()) as pool:
        options = PrepareOptions(plan.sources, **plan.options, bad_rows=plan.bad_rows)
        corpus = open_corpus(plan.sources, options.reading, dataset)
        plan = replace(plan, options=settled(plan.options, corpus.file_bytes()))
        snapshot = Snapshot(corpus, plan.unit_bytes, as_known(journal.known_hashes()))
        _check_complete(journal, plan, snapshot)
        preparation = Preparation(options, Share(0, plan.tasks), corpus, journal=journal, workers=pool)
        _finish_of_tasks(preparation, plan, snapshot)


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working folder was removed: change to one that exists") from None


def dataset_folder(options: PrepareOptions) -> Path:
    return Path(options.data_dir) / (options.name or default_name((options.sources or [""])[0]))


def check_before(options: PrepareOptions, tasks: int) -> Path:
    """The dataset's folder of a preparation in `tasks` jobs, once its options and local sources are
    checked.

    Raises UserError. Sources behind a network are not opened, since the jobs' nodes may be on
    another one.
    """
    if options.task_id is not None or "-" in options.sources:
        raise UserError("--task-id and stdin (-) cannot be submitted: SLURM numbers the tasks, and a job has no stdin")
    check(replace(options, task_id=0, tasks=tasks))
    dataset = dataset_folder(options)
    local = [
        source
        for source in options.sources
        if not (hub_source(source) or is_named(source) or is_url(without_file_protocol(source)))
    ]
    corpus = open_corpus(local, options.reading, dataset) if local else Corpus([], [])
    if not any(map(hub_source, options.sources)):
        corpus.check_split(options.split)
    return dataset


def _run_alone(preparation: Preparation) -> None:
    dataset = preparation.dataset
    with one_writer(dataset):
        try:
            for _ in range(MOST_ROUNDS):
                preparation.journal.remove_partial()
                begun = preparation.begin()
                if begun is None or _prepare(preparation, *begun):
                    return
                preparation = replace(preparation, corpus=_reopened(preparation))
                preparation.workers.close()  # they may hold open what is another file now
            raise UserError(
                f"the sources changed {MOST_ROUNDS} times while {dataset} was prepared from them: run the same command "
                "again once they no longer change; what was encoded is kept"
            )
        finally:
            (dataset / STDIN_SPOOL).unlink(missing_ok=True)


def _prepare(preparation: Preparation, plan: Plan, snapshot: Snapshot) -> bool:
    """Encode and finish; False if the sources have changed meanwhile."""
    try:
        _encode(preparation, plan, snapshot)
        return _finish(preparation, plan, snapshot)
    except (UserError, OSError):
        # A file that is cut off or removed while it is read looks damaged.
        if _is_current(preparation):
            raise
        return False


def _finish(preparation: Preparation, plan: Plan, snapshot: Snapshot) -> bool:
    return finish(
        preparation.journal, plan, snapshot, preparation.workers, bad_rows=preparation.options.bad_rows,
        is_current=lambda: _is_current(preparation),
    )  # fmt: skip


def _finish_of_tasks(preparation: Preparation, plan: Plan, snapshot: Snapshot) -> None:
    # None of several tasks could encode again alone what changed.
    if not _finish(preparation, plan, snapshot):
        raise UserError(
            f"the sources changed while {preparation.dataset} was prepared from them: run the same command again for "
            "every task; what did not change is kept"
        )


def _reopened(preparation: Preparation) -> Corpus:
    options = preparation.options
    return open_corpus(options.sources, options.reading, preparation.dataset, earlier=preparation.corpus)


def _is_current(preparation: Preparation) -> bool:
    """Whether the sources are as they were when they were listed."""
    return _reopened(preparation).stored == preparation.corpus.stored


def _run_task(preparation: Preparation) -> None:
    """Encode a task's share, next to other tasks; the last one to finish makes the dataset."""
    dataset, share = preparation.dataset, preparation.share
    with suppress(Held), one_writer(dataset):
        preparation.journal.remove_partial()
    with one_writer(dataset, shared=True), one_writer(dataset, f".lock_{share.task:04d}"):
        if begun := preparation.begin():
            _encode(preparation, *begun)
    if begun and not _finish_if_last(preparation, *begun):
        logger.info("task %d of %d is done; the last one makes the dataset, or `pipeline merge %s`", *share, dataset)


def _encode(preparation: Preparation, plan: Plan, snapshot: Snapshot) -> None:
    """Encode the units of this task, and hash its share of the source files meanwhile."""
    journal, corpus, share = preparation.journal, preparation.corpus, preparation.share
    known = journal.known_hashes()
    items: Items = snapshot
    text_bytes = snapshot.text_bytes
    if share.tasks > 1:
        everything = list(snapshot)
        mine = [everything[number] for number in share.items([item.size for _, item in everything])]
        items, text_bytes = mine, lambda: sum(item.size for _, item in mine)
    with ThreadPoolExecutor(HASH_THREADS) as hashing, ThreadPoolExecutor(1) as noting:

        def note_hashes() -> None:
            # Hashed now, by all tasks, so that the last one need not read the whole corpus again for
            # the manifest. Here, as a file may have to be downloaded first.
            paths = islice(corpus.files(), share.task, None, share.tasks)
            unknown = (path for path in paths if local_file(path) not in known)
            journal.note_hashes(share.task, hashing.map(_stamped_hash, unknown))

        noted = noting.submit(note_hashes)
        try:
            stop = preparation.options.bad_rows == STOP
            encode_items(journal, plan, items, preparation.workers, text_bytes=text_bytes, stop=stop)
            noted.result()
        finally:
            hashing.shutdown(cancel_futures=True)


def _stamped_hash(path: Path) -> tuple[StoredFile, str]:
    """The stamp is taken before the file is read, so that it never stands for later content."""
    before = local_file(path)
    return before, hash_file(path)


def _finish_if_last(preparation: Preparation, plan: Plan, snapshot: Snapshot) -> bool:
    """Make the dataset if every part of it exists; False if other tasks are still to come.

    A task that gets the exclusive lock knows that no other is at work: each holds the shared one
    until its parts exist.
    """
    journal = preparation.journal
    try:
        with one_writer(preparation.dataset):
            if journal.plan() is None:  # another task has made the dataset
                return True
            if journal.incomplete_items(snapshot.keys):
                return False
            _finish_of_tasks(preparation, plan, snapshot)
            return True
    except Held:
        return False


def _check_complete(journal: Journal, plan: Plan, snapshot: Snapshot) -> None:
    sizes = [item.size for _, item in snapshot]
    if missing := journal.incomplete_items(snapshot.keys):
        tasks = sorted({tasks_of(sizes, plan.tasks)[item] for item in missing})
        raise UserError(
            f"{journal.dataset} is not complete: {len(missing)} of {len(sizes)} items of the corpus are missing; "
            f"run the same command again for --task-id {shortened([str(task) for task in tasks])} of --tasks {plan.tasks}"
        )
