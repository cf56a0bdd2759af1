"""The units of a task that are not done yet, through the workers."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from pipeline.errors import UserError
from pipeline.log import ProgressReport, logger
from prepare.encoding.encode import Encoder, Task, UnitEncoder, encode
from prepare.encoding.engine import EngineFault, can_be_faster
from prepare.unfinished.journal import Journal, Plan, Share
from prepare.unfinished.parts import Summary, part_name, read_summary
from prepare.units import Item, OneUnit, Texts, Unit
from prepare.workers import Workers


def encode_share(journal: Journal, plan: Plan, items: list[Item], share: Share, workers: Workers) -> None:
    """Encode every unit of a task's items, with gigatoken while it does what tiktoken does."""
    fast = can_be_faster(plan.tokenizer["name"]) and not journal.distrusted()
    try:
        _encode_missing(journal, plan, items, share, workers, fast)
    except EngineFault as fault:
        logger.warning("gigatoken %s: starting over with tiktoken alone", fault)
        journal.distrust(str(fault))
        _encode_missing(journal, plan, items, share, workers, fast=False)


def _encode_missing(
    journal: Journal, plan: Plan, items: list[Item], share: Share, workers: Workers, fast: bool
) -> None:
    encoder = Encoder(plan.tokenizer, journal.folder, journal.staged, plan.options["seed"], fast)
    limit = plan.options["limit_docs"]
    todo = _Missing(journal, plan, items, share)
    if len(items) == 1 and isinstance(items[0], OneUnit):
        workers = Workers(1)
    total = None if limit else sum(plan.sizes[item] for item in share.items(plan.sizes)) / 1e6
    documents = tokens = 0
    with ProgressReport("encode", total, "MB", done=todo.done_bytes / 1e6) as report:
        try:
            for summary in workers.map(encode, ((encoder, task) for task in todo)):
                todo.note(summary)
                documents += summary.documents
                tokens += summary.tokens
                report.advance(summary.size / 1e6, f"{documents:,} documents, {tokens:,} tokens")
        except BrokenProcessPool:
            if fast:
                raise EngineFault("may have killed a worker") from None
            raise UserError(
                f"one of the {workers.count} workers was killed, usually because memory ran out: run again with fewer "
                "--workers; it goes on from here"
            ) from None
    if limit:
        _cut_at_limit(journal, items, encoder, limit)


class _Missing:
    """A task's units that are not done, in the corpus's order; with a limit, up to the unit that reaches it."""

    def __init__(self, journal: Journal, plan: Plan, items: list[Item], share: Share) -> None:
        self._journal, self._items = journal, items
        self._mine = share.items(plan.sizes)
        self._limit = plan.options["limit_docs"]
        self._done = journal.finished_units()
        self._complete = {item for item, units in self._done.items() if journal.is_complete(item, units)}
        self.done_bytes = sum(plan.sizes[item] for item in self._mine if item in self._complete)
        # For the limit: the documents of every unit that is done, and how far they are without a gap.
        self._documents: dict[tuple[int, int], tuple[int, bool]] = {}
        self._next, self._taken = (0, 0), 0
        if self._limit:
            for item, units in self._done.items():
                for unit in units:
                    self.note(read_summary(journal.folder / part_name(item, unit)))

    def __iter__(self) -> Iterator[Task]:
        for item in self._mine:
            if item in self._complete:
                continue
            done = self._done.get(item, set())
            for unit, (work, last) in enumerate(_with_last(self._items[item].units())):
                if self._limit and self._taken >= self._limit:
                    return
                if unit in done:
                    continue
                yield Task(item, unit, last, work, self._limit)

    def note(self, summary: Summary) -> None:
        """A unit is done."""
        if not self._limit:
            return
        self._documents[summary.item, summary.unit] = (summary.documents, summary.last)
        while self._next in self._documents:
            documents, last = self._documents.pop(self._next)
            self._taken += documents
            self._next = (self._next[0] + 1, 0) if last else (self._next[0], self._next[1] + 1)


def _with_last(units: Iterator[Unit]) -> Iterator[tuple[Unit, bool]]:
    """Each unit, and whether it is the last; an item without any has an empty one."""
    before = next(units, None) or Texts((), 0, "", 0)
    for unit in units:
        yield before, False
        before = unit
    yield before, True


def _cut_at_limit(journal: Journal, items: list[Item], encoder: Encoder, limit: int) -> None:
    """Encode the unit in which the limit falls again, up to the last wanted document and no further."""
    summaries = [read_summary(path) for path in journal.parts(len(items), limit)]
    over = sum(summary.documents for summary in summaries) - limit
    if over > 0:
        cut = summaries[-1]
        work = next(islice(items[cut.item].units(), cut.unit, None))
        UnitEncoder(encoder).encode(Task(cut.item, cut.unit, cut.last, work, cut.documents - over))
