"""The units that are not yet encoded, handed to the workers."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from pipeline.errors import UserError
from pipeline.log import ProgressReport, logger
from prepare.encoding.contamination import NGRAMS_FILE
from prepare.encoding.encode import EncodingOptions, UnitEncoder, UnitJob, encode
from prepare.encoding.engine import PLAIN, EngineFault, fast_libraries
from prepare.unfinished.journal import Journal, Plan
from prepare.unfinished.parts import Summary, part_name, read_summary
from prepare.units import Item, OneUnit, Texts, Unit
from prepare.workers import Workers


def encode_items(journal: Journal, plan: Plan, items: dict[int, Item], workers: Workers) -> None:
    """Encode all units of `items` (by number), with a faster library while it agrees with tiktoken."""
    if len(items) == 1 and isinstance(next(iter(items.values())), OneUnit):
        workers = Workers(1)  # one unit keeps one process busy, and this one is running already
    for engine in (*fast_libraries(plan.tokenizer["name"], journal.distrusted()), PLAIN):
        try:
            _encode_missing(journal, plan, _Missing(journal, plan, items), workers, engine=engine)
            return
        except EngineFault as fault:
            logger.warning("%s %s: starting over without it", engine, fault)
            journal.distrust(engine, str(fault))


class _Missing:
    """The units that are not yet encoded, in corpus order.

    With a limit, up to the unit that reaches it.
    """

    def __init__(self, journal: Journal, plan: Plan, items: dict[int, Item]) -> None:
        self.items = items
        self._limit = plan.options["limit_docs"]
        self._finished = journal.finished_units()
        self._complete = {item for item, units in self._finished.items() if journal.is_complete(item, units)}
        self.done_bytes = sum(plan.sizes[item] for item in items if item in self._complete)
        self.total_bytes = None if self._limit else sum(plan.sizes[item] for item in items)
        # Units finish in any order, but the limit counts documents from the corpus's beginning. So
        # a finished unit waits here, as (documents, last), until all units before it are finished;
        # `_next` is the first that is not.
        self._waiting: dict[tuple[int, int], tuple[int, bool]] = {}
        self._next, self._documents = (0, 0), 0
        if self._limit:
            for item, units in self._finished.items():
                for unit in units:
                    self.note(read_summary(journal.folder / part_name(item, unit)))

    def __iter__(self) -> Iterator[UnitJob]:
        for number, item in self.items.items():
            if number in self._complete:
                continue
            finished = self._finished.get(number, set())
            for unit, (work, last) in enumerate(_with_last(item.units())):
                if self._limit and self._documents >= self._limit:
                    return
                if unit in finished:
                    continue
                yield UnitJob(item=number, unit=unit, last=last, work=work, limit=self._limit)

    def note(self, summary: Summary) -> None:
        """A unit is finished."""
        if not self._limit:
            return
        self._waiting[summary.item, summary.unit] = (summary.documents, summary.last)
        while self._next in self._waiting:
            documents, last = self._waiting.pop(self._next)
            self._documents += documents
            self._next = (self._next[0] + 1, 0) if last else (self._next[0], self._next[1] + 1)


def _encode_missing(journal: Journal, plan: Plan, missing: _Missing, workers: Workers, *, engine: str) -> None:
    seed = plan.options["seed"]
    evaluation = (journal.folder / NGRAMS_FILE, list(plan.options["decontaminate"]))
    options = EncodingOptions(
        plan.tokenizer, journal.folder, journal.staged, seed=seed, engine=engine,
        near_dedup=plan.options["near_dedup"], evaluation=evaluation if evaluation[1] else None,
    )  # fmt: skip
    total = None if missing.total_bytes is None else missing.total_bytes / 1e6
    documents = tokens = 0
    with ProgressReport("encode", total, "MB", done=missing.done_bytes / 1e6) as progress:
        try:
            for summary in workers.map(encode, ((options, job) for job in missing)):
                missing.note(summary)
                documents += summary.documents
                tokens += summary.tokens
                progress.advance(summary.size / 1e6, f"{documents:,} documents, {tokens:,} tokens")
        except BrokenProcessPool:
            if engine != PLAIN:
                raise EngineFault("may have killed a worker") from None
            raise UserError(
                f"one of the {workers.count} workers was killed, usually because memory ran out: run the same command "
                "again with fewer --workers, and it resumes here"
            ) from None
    if limit := plan.options["limit_docs"]:
        _truncate_at_limit(journal, missing.items, options, limit)


def _with_last(units: Iterator[Unit]) -> Iterator[tuple[Unit, bool]]:
    """Each unit, and whether it is the last one.

    An item without units gets an empty one, so that it has a part.
    """
    previous = next(units, None) or Texts((), 0, "", 0)
    for unit in units:
        yield previous, False
        previous = unit
    yield previous, True


def _truncate_at_limit(journal: Journal, items: dict[int, Item], options: EncodingOptions, limit: int) -> None:
    """Encode again the unit in which the limit falls, up to the last document that is wanted."""
    summaries = [read_summary(path) for path in journal.parts(limit)]
    excess = sum(summary.documents for summary in summaries) - limit
    if excess > 0:
        over = summaries[-1]
        work = next(islice(items[over.item].units(), over.unit, None))
        job = UnitJob(item=over.item, unit=over.unit, last=over.last, work=work, limit=over.documents - excess)
        UnitEncoder(options).encode(job)
