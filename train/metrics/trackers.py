"""`log.also`: the rows for wandb, trackio or mlflow, each fed by a process next to this one.

    rank 0  --a JSON object a line, without waiting-->  python feed.py NAME  -->  the library

A library that hangs, fails, prints, asks on the keyboard or takes seconds to import costs the run its
rows there, and nothing else.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

from pipeline.config.keys import Config
from pipeline.config.load import to_dict
from pipeline.log import logger
from pipeline.runs import Row
from train.metrics.record import Metrics, tag

CLOSE_S = 10.0  # to send what is left; a SLURM job has a minute between its deadline and its end
MOST_PENDING = 1 << 20  # bytes for a library that is slow or hangs: thousands of rows


def is_installed(name: str, key: str) -> bool:
    """Whether that library is; a warning says so where it is not, and the run does without."""
    if find_spec(name) is None:
        logger.warning("%s is not installed, so %s is ignored: pip install %s", name, key, name)
        return False
    return True


class Tracker(Metrics):
    """Never raises, and waits only when closed."""

    def __init__(self, name: str, config: Config) -> None:
        self._name, self._pending = name, b""
        command = [sys.executable, "-P", str(Path(__file__).with_name("feed.py")), name, str(config.run_dir.absolute())]
        # What libraries print is dropped, as it may repeat the credentials that they find in the environment.
        self._child = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, bufsize=0, start_new_session=True)
        assert self._child.stdin is not None
        self._pipe = self._child.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self._send(to_dict(config))

    def write(self, row: Row) -> None:
        known = {tag(name): value for name, value in row.items() if value is not None and name != "step"}
        self._send(known | {"step": row["step"]})

    def close(self) -> None:
        reason = f"no answer in {CLOSE_S:.0f} s"
        with suppress(TimeoutExpired):
            reason = self._child.communicate(self._pending, CLOSE_S)[0].decode(errors="replace")
        with suppress(OSError):  # its own processes too
            os.killpg(self._child.pid, signal.SIGKILL)
        if self._child.wait():
            logger.warning("log.also: %s did not get all rows (%s); metrics.jsonl has them", self._name, reason)

    def _send(self, message: Row) -> None:
        if len(self._pending) < MOST_PENDING:
            self._pending += json.dumps(message).encode() + b"\n"
            with suppress(OSError):  # a full pipe; a child that is gone, which is reported at the end
                self._pending = self._pending[os.write(self._pipe, self._pending) :]
