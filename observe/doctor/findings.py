"""What a check reports, and how checks are run: each in a process of its own, so that one which
crashes, or never returns, is a line too.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection

from pipeline import launch
from pipeline.errors import reason_of


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"  # slower, or wrong for some runs
    FAIL = "fail"  # training will not start, or will lose work


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it; no advice where all is well."""

    check: str
    status: Status
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, Status.OK, found)


def fail(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Status.FAIL, found, advice)


def judge(check: str, found: str, faults: list[tuple[bool, str, str]]) -> Iterator[Finding]:
    """A warning, with its advice, for each fault that is true; `found` if none is."""
    warnings = [Finding(check, Status.WARN, fault, advice) for is_true, fault, advice in faults if is_true]
    yield from warnings or [ok(check, found)]


@dataclass(frozen=True)
class Check:
    """`find` may take `limit_s` seconds: a disk or a GPU that hangs answers never."""

    name: str
    find: Callable[[], Iterator[Finding]]
    limit_s: float = 20.0

    def run(self) -> Iterator[Finding]:
        # fork: half a second less each than a new interpreter, and torch is only in the child that
        # imports it.
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=self._send, args=(sending,), daemon=True)
        deadline, reason = time.monotonic() + self.limit_s, f"no answer within {self.limit_s:.0f} s"
        child.start()
        sending.close()
        try:
            while receiving.poll(max(deadline - time.monotonic(), 0)):
                if (finding := receiving.recv()) is None:
                    return
                yield finding
        except EOFError:
            child.join(1)
            code = child.exitcode or 0
            reason = f"the check was ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        finally:
            child.kill()
            receiving.close()
        yield fail(self.name, reason, "see what the kernel logs (dmesg), then run pipeline doctor again")

    def _send(self, sending: Connection) -> None:
        launch.start_worker()
        try:
            for finding in self.find():
                sending.send(finding)
        except Exception as error:
            reason = f"could not be checked: {reason_of(error)}"
            sending.send(Finding(self.name, Status.WARN, reason, "look at it by hand"))
        sending.send(None)
