"""Raw text -> a prepared dataset: sources -> plan -> parts -> shards -> manifest.

All work happens in `<dataset>/unfinished/`, and each finished step is a file there, so running the
same command again resumes where a killed run stopped. The dataset itself appears, or replaces an
earlier one, once it is complete.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from pipeline.files import Held, one_writer
from pipeline.log import logger
from prepare.assembly.finish import finish
from prepare.encoding.work import encode_items
from prepare.options import PrepareOptions, check
from prepare.preparation import Preparation, shortened
from prepare.sources.corpus import open_corpus
from prepare.sources.local import stamped_hash
from prepare.sources.names import default_name, hub_source, is_named
from prepare.storage.files import is_url
from prepare.unfinished.journal import Journal, Plan, tasks_of
from prepare.units import STDIN_SPOOL, Reading
from prepare.workers import Workers, available_cores

# Hashing releases the interpreter lock; two threads keep up with a disk and leave the cores to the
# workers.
HASH_THREADS = 2


def run(options: PrepareOptions) -> Path:
    """Prepare the dataset, or resume it, unless it is already prepared; returns its folder."""
    started = time.monotonic()
    share = check(options)
    dataset = dataset_folder(options)
    corpus = open_corpus(options.sources, options.reading, dataset)
    with Workers(options.workers or available_cores()) as workers:
        preparation = Preparation(options, share, corpus, journal=Journal(dataset), workers=workers)
        if preparation.journal.is_publishing():  # a kill interrupted it after all work was done
            with one_writer(dataset):
                preparation.journal.finish_publishing()
        if share.tasks == 1:
            _run_alone(preparation)
        else:
            _run_task(preparation)
    logger.info("took %s s", f"{time.monotonic() - started:,.1f}")
    return dataset


def merge(dataset: Path, workers: int | None = None) -> None:
    """Make the dataset from the parts of all tasks."""
    dataset = dataset.absolute()
    journal = Journal(dataset)
    plan = journal.plan()
    if plan is None:
        load_manifest(dataset)
        logger.info("%s is already prepared", dataset)
        return
    # The sources are named relative to the folder in which the tasks ran.
    with one_writer(dataset), chdir(plan.working_folder), Workers(workers or available_cores()) as pool:
        corpus = open_corpus(
            plan.sources, Reading(plan.options["text_field"], split=plan.options.get("split", Reading.split)), dataset
        )
        _check_complete(journal, plan)
        finish(journal, plan, corpus, pool)


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
    local = [source for source in options.sources if not (hub_source(source) or is_named(source) or is_url(source))]
    if local:
        open_corpus(local, options.reading, dataset)
    return dataset


def _run_alone(preparation: Preparation) -> None:
    dataset = preparation.dataset
    with one_writer(dataset):
        try:
            if plan := preparation.begin():
                _encode(preparation, plan)
                finish(preparation.journal, plan, preparation.corpus, preparation.workers)
        finally:
            (dataset / STDIN_SPOOL).unlink(missing_ok=True)


def _run_task(preparation: Preparation) -> None:
    """Encode a task's share, next to other tasks; the last one to finish makes the dataset."""
    dataset, share = preparation.dataset, preparation.share
    with one_writer(dataset, shared=True), one_writer(dataset, f".lock_{share.task:04d}"):
        if plan := preparation.begin():
            _encode(preparation, plan)
    if plan and not _finish_if_last(preparation, plan):
        logger.info("task %d of %d is done; the last one makes the dataset, or `pipeline merge %s`", *share, dataset)


def _encode(preparation: Preparation, plan: Plan) -> None:
    """Encode the units of this task, and hash its share of the source files meanwhile."""
    journal, corpus, share = preparation.journal, preparation.corpus, preparation.share
    known = journal.known_hashes()
    # Hashed now, by all tasks, so that the last one need not read the whole corpus again for the
    # manifest.
    paths = [path for path in corpus.files()[share.task :: share.tasks] if str(path) not in known]
    items = corpus.items()
    mine = {number: items[number] for number in share.items(plan.sizes)}
    with ThreadPoolExecutor(HASH_THREADS) as hashing, ThreadPoolExecutor(1) as noting:
        noted = noting.submit(journal.note_hashes, paths, share.task, hashing.map(stamped_hash, paths))
        try:
            encode_items(journal, plan, mine, preparation.workers)
            noted.result()
        finally:
            hashing.shutdown(cancel_futures=True)


def _finish_if_last(preparation: Preparation, plan: Plan) -> bool:
    """Make the dataset if every part of it exists; False if other tasks are still to come.

    A task that gets the exclusive lock knows that no other is at work: each holds the shared one
    until its parts exist.
    """
    journal = preparation.journal
    try:
        with one_writer(preparation.dataset):
            if journal.plan() is None:  # another task has made the dataset
                return True
            if journal.incomplete_items(plan):
                return False
            finish(journal, plan, preparation.corpus, preparation.workers)
            return True
    except Held:
        return False


def _check_complete(journal: Journal, plan: Plan) -> None:
    missing = journal.incomplete_items(plan)
    if missing:
        tasks = sorted({tasks_of(plan.sizes, plan.tasks)[item] for item in missing})
        raise UserError(
            f"{journal.dataset} is not complete: {len(missing)} of {len(plan.sizes)} items of the corpus are missing; "
            f"run the same command again for --task-id {shortened([str(task) for task in tasks])} of --tasks {plan.tasks}"
        )
