"""Watches over the ranks of a run: a thread of each, which talks to the others through the store where they met.

No collective is involved, so it also works while the ranks wait in one that never ends. The first
fault that any rank posts is the one that ends all of them. A rank that is late calls the roll:

    rank 0   step 12 ...................... late: calls the roll   answers: waits in step 12
    rank 1   step 12 ................................................ answers: waits in step 12
    rank 2   data of step 12 ........................................ answers: reads its data      <- named
    rank 3   (stopped) ................................................                            <- named
"""

import faulthandler
import json
import math
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar, cast

import torch.distributed as dist
from torch._C import _distributed_c10d as distributed_c
from torch.distributed.distributed_c10d import Store

from pipeline import launch
from pipeline.errors import EXIT_RETRY, Failure, Left, code_of, reason_of
from pipeline.launch import Placement
from pipeline.log import logger, record

# How long ranks wait for each other at least but in a step: the slowest node loads torch from a shared
# filesystem, the first step compiles, a save writes gigabytes.
START_S = 1800.0
BEAT_S = 1.0
ANSWER_S = 5.0  # how long the store, or a rank, may take to answer
GRACE_S = 3.0  # for a main thread to notice by itself that a collective failed
MOST_TRACE_CHARACTERS = 4000
RECORD_S = 120.0  # for rank 0 to save and record: launchers end all ranks once one has exited
# In the errors of collectives whose other ranks are gone; they have no type of their own under gloo.
BROKEN_LINK = re.compile("gloo|NCCL|[Cc]onnection|[Ss]ocket|process group")
# srun's rank 0 holds the store; under torchrun, the launcher of the first node does.
NO_STORE = "the store of the ranks does not respond: rank 0 or its launcher was stopped or killed, or the node is lost"
RETRY = "started again, the run resumes from its last checkpoint"
T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """What ends all ranks: the rank that found it, the exit code, and why in one line."""

    rank: int
    code: int
    reason: str

    @classmethod
    def of(cls, error: Exception, rank: int = 0) -> Self:
        return cls(rank, code_of(error), reason_of(error))

    def __str__(self) -> str:
        # A retry is for a rank that is late or lost, which the reason names itself.
        return f"rank {self.rank}: {self.reason}" if self.rank and self.code != EXIT_RETRY else self.reason


@dataclass(frozen=True)
class Phase:
    """What a main thread is doing, and how long that may take. `waits`: for other ranks too, so that
    being late need not be its own fault.
    """

    doing: str
    limit_s: float
    waits: bool = True
    since: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.since + self.limit_s


class Watch:
    """Of one rank. Unless it was started, as for a run of one process, it never ends anything by itself."""

    def __init__(self, place: Placement | None = None) -> None:
        self.place = place or Placement()
        self.timeout_s = math.inf  # of a step but the first
        self.phase = Phase("start-up", math.inf)
        # What this rank does before all exit for a fault, such as saving; the run sets it.
        self.before_exit: Callable[[Fault], None] = lambda fault: None
        self.is_agreed = False  # all ranks know why they end, and exit together
        self._main_thread = threading.get_ident()
        self._ending, self._closed = threading.Lock(), threading.Event()
        self._known: Fault | None = None
        self._ended = self._first_is_absent = False
        self._answered, self._answered_at = 0, -math.inf
        self._store: Store | None = None
        # A thread for it alone: a store whose process is stopped never answers.
        self._asking = ThreadPoolExecutor(1, "watch")

    def start(self, store: Store, timeout_s: float) -> None:
        """Begin to watch, through a store that no earlier start has used."""
        self.timeout_s = timeout_s
        self.enter("start-up")
        # A client for it alone: another one may be waiting in the main thread.
        self._store = cast(Any, store).clone()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def enter(self, doing: str, *, waits: bool = True, brief: bool = False) -> None:
        """Before each part of the main thread's work. `brief`: it takes no longer than a step does."""
        self.phase = Phase(doing, self.timeout_s if brief else max(START_S, self.timeout_s), waits)

    def check(self) -> None:
        """After a collective: raises Failure where its result is void, as the ranks are ending."""
        if self._known is not None:
            raise Failure(str(self._known))

    def close(self) -> None:
        """Before the ranks part in order."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def settle(self, error: Exception) -> BaseException:
        """Ends the run on every rank for an error that this one may be the only one to have. Returns
        what to raise: the error, or Left where another rank's came first.
        """
        if self.is_agreed:
            return error
        fault = Fault.of(error, self.place.rank)
        if self._store is None:
            self._end(fault)
            self.is_agreed = True
            return error
        launch.outlive_others()
        # Another rank may be about to post what broke the connection.
        broken = isinstance(error, RuntimeError) and BROKEN_LINK.search(str(error))
        if broken and not self._await(lambda store: store.check(["fault"]), GRACE_S):
            reason = self._call_roll(lost=True) or f"lost the connection to another rank ({str(error).splitlines()[0]})"
            error = Failure(f"{reason}; {RETRY}")
            fault = Fault.of(error, self.place.rank)
        fault = self._post(fault)
        with self._ending:  # where the watching thread came first, it ends the process
            self._end(fault)
        self.is_agreed = True
        return error if fault.rank == self.place.rank else Left(fault.code, str(fault))

    # ---- the watching thread ----

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            # Should a library keep the interpreter's lock, this thread stops too; this timer needs
            # no lock, and prints the stacks.
            with suppress(AttributeError, ValueError, RuntimeError):  # a notebook's stderr is no file
                faulthandler.dump_traceback_later(self.phase.limit_s)
            rolls = self._answer_new_rolls()
            # Ranks are late together: who has just answered one roll calls no second one.
            if self.phase.is_late and time.monotonic() > self._answered_at + 3 * ANSWER_S:
                if rolls is None:
                    self._first_is_absent = True
                    self._exit(Fault(self.place.rank, EXIT_RETRY, f"{NO_STORE}; {RETRY}"))
                if reason := self._call_roll():
                    self._post(Fault(self.place.rank, EXIT_RETRY, f"{reason}; {RETRY}"))
            if (fault := self._posted()) and not self._closed.wait(GRACE_S):
                self._exit(fault)

    def _exit(self, fault: Fault) -> None:
        self._known = fault
        with suppress(Exception):  # NCCL's kernels would wait on, and every copy from the GPU behind them
            dist.distributed_c10d._abort_process_group()
        with self._ending:
            if self._ended:  # by the main thread, which is about to exit
                time.sleep(GRACE_S)
                launch.end_process(fault.code)
            self._end(fault)
            with suppress(OSError):
                (logger.error if fault.rank == self.place.rank else record)(f"error: {fault}")
            launch.end_process(fault.code)  # with the lock, for which the main thread may be waiting

    def _end(self, fault: Fault) -> None:
        self._ended = True
        is_first = self.place.rank == 0
        if not is_first and not self._first_is_absent:
            self._await(lambda store: store.check(["recorded"]), RECORD_S)
        if is_first or (self._first_is_absent and fault.rank == self.place.rank):
            try:
                self.before_exit(fault)
            except Exception as error:  # the fault is worth more
                logger.warning("%s", reason_of(error))
            if self._store is not None:
                self._ask(lambda store: store.set("recorded", "1"))
            if is_first and self.place.by_srun:
                time.sleep(GRACE_S)  # the store, where the others look for the fault, ends with this process

    # ---- what ranks tell each other ----

    def _call_roll(self, lost: bool = False) -> str:
        """Ask every rank what it is doing. Returns who keeps the others waiting, or with `lost` who is
        gone; empty where that is nobody, as while one is busy and not late.
        """
        roll = self._ask(lambda store: store.add("rolls", 1)) or 0
        self._answer(roll)
        keys = {rank: f"answer {roll} {rank}" for rank in range(self.place.size)}
        # Another rank may call one at the same time, and would take this one for lost.
        self._await(lambda store: store.check(list(keys.values())), ANSWER_S, meanwhile=self._answer_new_rolls)
        found = self._ask(lambda store: {r: store.get(key) for r, key in keys.items() if store.check([key])}) or {}
        answers: dict[int, dict[str, Any]] = {rank: json.loads(answer) for rank, answer in found.items()}
        absent = [rank for rank in range(self.place.size) if rank not in answers]
        busy = {rank: answer for rank, answer in answers.items() if not answer["waits"]}
        self._first_is_absent = 0 in absent
        if self.place.rank in absent:  # the store is gone too
            return NO_STORE
        if absent:
            ranks = f"rank(s) {', '.join(map(str, absent))} of {self.place.size}"
            reason = f"{ranks} did not respond: stopped, killed, or the node is lost"
        elif lost or any(not answer["late"] for answer in busy.values()):
            return ""
        else:
            named = [f"rank {rank} of {self.place.size} has spent" for rank in busy] or ["all ranks have spent"]
            doing = next(iter((busy or answers).values()))
            reason = f"{', '.join(named)} more than {doing['limit_s']:.0f} s in {doing['doing']} (parallel.timeout_s)"
            # Those that wait for one another are in the same collective; one that computes is not.
            stacks = [answer["stack"] for answer in answers.values()]
            odd = [rank for rank, answer in answers.items() if stacks.count(answer["stack"]) == 1]
            if not busy and len(odd) == 1:
                reason += f"; rank {odd[0]} of {self.place.size} is not where the others wait"
        for stack in {} if lost else {answer["stack"]: None for answer in answers.values()}:
            same = [str(rank) for rank, answer in answers.items() if answer["stack"] == stack]
            first = answers[int(same[0])]
            logger.warning("rank(s) %s, in %s:\n%s%s", ", ".join(same), first["doing"], stack, first["collectives"])
        return reason

    def _answer_new_rolls(self) -> int | None:
        """The number of rolls called; None where the store does not respond."""
        rolls = self._ask(lambda store: store.add("rolls", 0))
        if rolls is not None and rolls > self._answered:
            self._answer(rolls)
        return rolls

    def _answer(self, roll: int) -> None:
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main_thread]))
        # The collectives apart: with their times in it, no two ranks would have the same stack.
        found = {"late": self.phase.is_late, "stack": stack, "collectives": active_collectives()}
        answer = json.dumps(asdict(self.phase) | found)

        def answer_all(store: Store) -> None:
            # Ranks that lose one call rolls together: who answers the last answers those before.
            for number in range(self._answered + 1, roll + 1):
                store.set(f"answer {number} {self.place.rank}", answer)

        self._ask(answer_all)
        self._answered, self._answered_at = roll, time.monotonic()

    def _post(self, fault: Fault) -> Fault:
        """The first fault that any rank posted: this one, or another."""
        first = self._ask(lambda store: store.compare_set("fault", "", json.dumps(asdict(fault))))
        return Fault(**json.loads(first)) if first else fault

    def _posted(self) -> Fault | None:
        if not self._ask(lambda store: store.check(["fault"])):
            return None
        return self._post(Fault(self.place.rank, EXIT_RETRY, ""))

    def _await(
        self, condition: Callable[[Store], bool], patience_s: float, meanwhile: Callable[[], object] = lambda: None
    ) -> bool:
        """Whether it came true in time."""
        deadline = time.monotonic() + patience_s
        while (met := self._ask(condition)) is False and time.monotonic() < deadline:
            time.sleep(0.1)
            meanwhile()
        return bool(met)

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """None where the store does not respond, or is gone."""
        assert self._store is not None
        try:
            return self._asking.submit(question, self._store).result(ANSWER_S)
        except (TimeoutError, RuntimeError):  # of which torch's DistError is one
            return None


def active_collectives() -> str:
    """Those that began and did not end, of NCCL's flight recorder; nothing with another backend."""
    # Only builds with NCCL have it; _dump_fr_trace_json, which all have, is of another recorder, gloo's.
    dump = getattr(distributed_c, "_dump_nccl_trace_json", None)
    if dump is None or not dist.is_initialized() or dist.get_backend() != "nccl":
        return ""
    trace: bytes = dump(onlyActive=True)
    return trace.decode(errors="replace")[:MOST_TRACE_CHARACTERS]
