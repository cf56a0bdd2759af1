"""Worker processes that never outlive the program, whatever ends it."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from pipeline.launch import start_worker


class Workers:
    """Calls functions in `count` processes, in this one if `count` is 1; few calls are pending."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Start the processes now, each with `call`, which imports what they need: 0.3 s."""
        if self.count > 1:
            for _ in range(self.count):
                self._processes().submit(call)

    def map(self, call: Callable[[Any], Any], arguments: Iterable[Any], *, in_order: bool = False) -> Iterator[Any]:
        """The results in the order they finish, or that of the arguments, which may call `map` too.
        Raises BrokenProcessPool if a worker was killed.

        When it ends, also by an exception, no call is still running.
        """
        if self.count == 1:
            yield from map(call, arguments)
            return
        pending: list[Future[Any]] = []
        try:
            for argument in arguments:
                pending.append(self._processes().submit(call, argument))
                # The text of a stream travels in the arguments, so only enough of them wait to keep
                # all workers busy.
                if len(pending) >= self.count + 2:
                    yield from _finished(pending, in_order)
            while pending:
                yield from _finished(pending, in_order)
        except BrokenProcessPool:
            self.close()
            raise
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawn: a forked child would inherit locks that threads of pyarrow or datasets hold,
            # and never release them.
            self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), start_worker)
        return self._pool

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _finished(pending: list[Future[Any]], in_order: bool) -> Iterator[Any]:
    """The results of calls that are no longer pending, once there are any."""
    done, _ = wait(pending[:1] if in_order else pending, return_when=FIRST_COMPLETED)
    pending[:] = [future for future in pending if future not in done]
    yield from (future.result() for future in done)


def available_cores() -> int:
    """The cores this process may use: under SLURM fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
