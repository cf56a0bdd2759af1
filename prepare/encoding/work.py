"""The units that are not yet encoded, handed to the workers."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from pipeline.errors import UserError
from pipeline.log import ProgressReport, logger
from prepare.documents.lines import TextFile
from prepare.documents.streams import Rows
from prepare.encoding.contamination import NGRAMS_FILE
from prepare.encoding.encode import EncodingOptions, UnitEncoder, UnitJob, encode
from prepare.encoding.engine import PLAIN, EngineFault, fast_libraries
from prepare.unfinished.journal import Journal, Plan, is_complete
from prepare.unfinished.parts import Summary, part_name
from prepare.units import Item, OneUnit, Texts, Unit
from prepare.workers import Workers

# Each with the key of its parts; listed anew whenever it is iterated.
Items = Iterable[tuple[str, Item]]
# A larger document is shared by the workers if it is more than one of them should do: the parent
# reads it and writes its ids, fast enough for about so many workers, and shares one document at a time.
SHARED_BYTES, MOST_SHARING = 16 << 20, 4


def encode_items(
    journal: Journal, plan: Plan, items: Items, workers: Workers, *, text_bytes: Callable[[], int], stop: bool
) -> None:
    """Encode all units of `items`, with a faster library while it agrees with tiktoken.

    `text_bytes` is an estimate of all their text, for progress; with `stop` a broken row raises
    UserError.
    """
    # Before anything is listed, as an estimate from half of a listing may be far off.
    share_above = max(SHARED_BYTES, text_bytes() // min(workers.count, MOST_SHARING))
    few = list(islice(items, 2))
    if len(few) == 1 and isinstance(few[0][1], OneUnit) and not _is_shared(few[0][1], share_above):
        workers = Workers(1)  # one unit keeps one process busy, and this one is running already
    for engine in (*fast_libraries(plan.tokenizer["name"], journal.distrusted()), PLAIN):
        missing = _Missing(journal, plan, items, stop=stop)
        try:
            _encode_missing(
                journal, plan, missing, workers, engine=engine, text_bytes=text_bytes, share_above=share_above
            )
            if engine not in journal.distrusted():  # another task may have met a fault meanwhile
                return
        except EngineFault as fault:
            logger.warning("%s %s: starting over without it", engine, fault)
            journal.distrust(engine, str(fault))


def _is_shared(work: Item | Unit, above: int) -> bool:
    """Whether it is one document of more bytes than that."""
    is_document = isinstance(work, TextFile) or (isinstance(work, Rows) and len(work.rows) == 1)
    return is_document and work.size > above


class _Missing:
    """The units that are not yet encoded, in corpus order.

    With a limit, up to the unit that reaches it; with `stop`, up to the first broken row.
    """

    def __init__(self, journal: Journal, plan: Plan, items: Items, *, stop: bool) -> None:
        self.items = items
        self.keys: list[tuple[str, int]] = []
        self._finished = journal.finished()
        self.done_bytes = sum(summary.size for units in self._finished.values() for summary in units.values())
        self._folder, self._wanted, self._stop = journal.folder, plan.wanted(), stop
        self.limit = plan.options["limit_docs"]
        # With dedup nobody knows yet how many of a unit's documents are left.
        self._unit_limit = None if plan.options["dedup"] else self.limit
        # Units finish in any order, but the limit and the first broken row count from the corpus's
        # beginning. So a finished unit waits here until all units before it are finished; `_next`
        # is the first that is not, as the number of its item and its own.
        self._waiting: dict[tuple[int, int], Summary] = {}
        self._numbers: dict[str, int] = {}
        self._next = (0, 0)

    def __iter__(self) -> Iterator[UnitJob]:
        for number, (key, item) in enumerate(self.items):
            if self._wanted.is_full():
                return
            finished = self._finished.get(key, {})
            self.keys.append((key, 0))
            self._numbers[key] = number
            for summary in finished.values():
                self.note(summary)
            if is_complete(finished):
                continue
            for unit, (work, last) in enumerate(_with_last(item.units())):
                if self._wanted.is_full():
                    return
                if unit not in finished:
                    yield UnitJob(item=key, unit=unit, last=last, work=work, limit=self._unit_limit)

    def note(self, summary: Summary) -> None:
        """A unit is finished. Raises UserError for its first broken row, with `stop`."""
        if not self.limit and not self._stop:
            return
        self._waiting[self._numbers[summary.item], summary.unit] = summary
        while self._next in self._waiting and not self._wanted.is_full():
            first = self._waiting.pop(self._next)
            if self._stop:
                _check_no_broken_row(first)
            self._wanted.take(self._folder / part_name(first.item, first.unit), first.documents)
            self._next = (self._next[0] + 1, 0) if first.last else (self._next[0], self._next[1] + 1)


def _check_no_broken_row(summary: Summary) -> None:
    # Reasons are in the order in which they were first met.
    for reason, entry in summary.skipped.items():
        if entry.get("broken"):
            raise UserError(
                f"{entry['example']}: {reason}; --bad-rows stop ends at the first broken row: correct it, or pass "
                "--bad-rows skip to leave such rows out"
            )


def _encode_missing(
    journal: Journal, plan: Plan, missing: _Missing, workers: Workers, *, engine: str, text_bytes: Callable[[], int],
    share_above: int,
) -> None:  # fmt: skip
    seed = plan.options["seed"]
    evaluation = (journal.folder / NGRAMS_FILE, list(plan.options["decontaminate"] or ()))
    options = EncodingOptions(
        plan.tokenizer, journal.folder, journal.staged, seed=seed, engine=engine,
        near_dedup=bool(plan.options["near_dedup"]), evaluation=evaluation if evaluation[1] else None,
    )  # fmt: skip
    documents = tokens = 0

    def note(summary: Summary) -> None:
        nonlocal documents, tokens
        missing.note(summary)
        documents += summary.documents
        tokens += summary.tokens
        if not missing.limit:
            progress.total = text_bytes() / 1e6
        progress.advance(summary.size / 1e6, f"{documents:,} documents, {tokens:,} tokens")

    def calls() -> Iterator[tuple[EncodingOptions, UnitJob]]:
        for job in missing:
            if _is_shared(job.work, share_above):
                note(UnitEncoder(options, workers).encode(job))  # while workers finish the units before it
            else:
                yield options, job

    with ProgressReport("encode", None, "MB", done=missing.done_bytes / 1e6) as progress:
        try:
            for summary in workers.map(encode, calls()):
                note(summary)
        except BrokenProcessPool:
            if engine != PLAIN:
                raise EngineFault("may have killed a worker") from None
            raise UserError(
                f"one of the {workers.count} workers was killed, usually because memory ran out: run the same command "
                "again with fewer --workers, and it resumes here"
            ) from None
    if missing.limit:
        _truncate_at_limit(journal, plan, missing, options)


def _with_last(units: Iterator[Unit]) -> Iterator[tuple[Unit, bool]]:
    """Each unit, and whether it is the last one.

    An item without units gets an empty one, so that it has a part.
    """
    previous = next(units, None) or Texts((), 0, "", 0)
    for unit in units:
        yield previous, False
        previous = unit
    yield previous, True


def _truncate_at_limit(journal: Journal, plan: Plan, missing: _Missing, options: EncodingOptions) -> None:
    """Encode again the unit in which the limit falls, up to the last document that is wanted.

    Its complete part stays: the limit falls elsewhere once an earlier file has changed.
    """
    listed = journal.parts(missing.keys, plan.wanted())
    if not listed or (over := listed[-1]).path.exists():
        return
    item = next(item for key, item in missing.items if key == over.summary.item)
    work = next(islice(item.units(), over.summary.unit, None))
    job = UnitJob(
        item=over.summary.item, unit=over.summary.unit, last=over.summary.last, work=work, limit=over.documents,
        truncated=True,
    )  # fmt: skip
    UnitEncoder(options).encode(job)
