"""This process among others that want the same cores. No torch until it trains."""

import os
import time
from contextlib import suppress
from pathlib import Path

from pipeline.log import logger

MOST_WAIT = 0.3  # seconds a second that threads wait for a core, all together


def share_cores() -> None:
    """Let OpenMP's threads give up their core soon where they wait for each other. Call it before torch
    loads OpenMP.
    """
    # By default they look 300,000 times, for milliseconds: where another program has a core, they keep
    # the other one from the thread they wait for. Measured on two cores, a step of 0.8M parameters that
    # takes 45 ms on a quiet machine: with one busy program 184 ms, with 1,000 looks 94 ms, which is its
    # share; with two 206 and 135 ms; with three 1,232 and 281 ms, with 10,000 looks 582, with none 313.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class CoreWatch:
    """Warns once where other programs have the cores that this one's threads are ready to run on."""

    def __init__(self) -> None:
        self._waited_s, self._looked_at, self._warned = core_wait_s(), time.monotonic(), False

    def look(self) -> None:
        waited_s, now = core_wait_s(), time.monotonic()
        seconds = max(now - self._looked_at, 1e-9)
        share = (waited_s - self._waited_s) / seconds
        if share > MOST_WAIT and not self._warned:
            import torch  # here, as `share_cores` comes before

            self._warned, threads = True, torch.get_num_threads()
            logger.warning(
                "other programs take this machine's cores: in %.1f s the %d thread(s) of training waited %.1f s for one, so "
                "steps take longer; stop them (see top), or start fewer threads with OMP_NUM_THREADS=%d",
                seconds, threads, waited_s - self._waited_s, max(1, threads - 1),
            )  # fmt: skip
        self._waited_s, self._looked_at = waited_s, now


def core_wait_s() -> float:
    """Seconds that this process's threads have been ready to run without a core, by Linux's count; else 0."""
    waited_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # a thread that has ended; a kernel that does not count
            waited_ns += int(path.read_text().split()[1])
    return waited_ns / 1e9
