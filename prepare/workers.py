"""Processes that do the same work side by side, and end with the program whatever becomes of it."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from pipeline.launch import start_worker


class Workers:
    """Calls functions in `count` processes, or in this one if that is all, with a bounded number under way."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Start the processes now, each with `call`: they take a third of a second to load what they need."""
        if self.count > 1:
            for _ in range(self.count):
                self._processes().submit(call)

    def map(self, call: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
        """The results as they come. When it ends, by an error too, no call is under way any more.

        Raises BrokenProcessPool where a worker was killed.
        """
        if self.count == 1:
            yield from map(call, arguments)
            return
        pending: set[Future[Any]] = set()
        try:
            for argument in arguments:
                pending.add(self._processes().submit(call, argument))
                # A stream's text lies in the arguments, so no more of them wait than keep the workers busy.
                if len(pending) >= self.count + 2:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            self._close()
            raise
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawn: a forked child would inherit the threads of pyarrow and datasets in whatever state they are.
            self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), start_worker)
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
