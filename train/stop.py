"""When to stop before the last step: a signal, a stop-file, a deadline such as SLURM's time limit.

A rank only notices; all agree with the gradients of a step, after which the trainer saves, and exits
with code 0. Nothing is saved inside a signal handler, where half a step may be in flight.

    PIPELINE_STOP_FILE   stop once this file exists: not a signal, which torchrun would turn into a kill
    PIPELINE_DEADLINE    Unix time by which the run must be saved, such as the end of a SLURM job
"""

import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Self

from pipeline import launch
from pipeline.errors import UserError, reason_of
from pipeline.log import logger

# The batch scripts set the deadline this many seconds before the job ends. One that passed earlier
# than that when the run starts belongs to another job, and would stop every start of the run after
# one step.
EXIT_MARGIN_S = 60.0
LOOK_INTERVAL_S = 1.0
MAX_MINUTES = "max_minutes"  # the reason of a run that ends before train.max_steps and is done
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
# A closed terminal, Ctrl-\\, a limit of processor time. `nohup`, for one, starts a program that ignores them.
SIGNALS_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)


class FileRequest:
    """Something that the user asks for by creating a file, which is looked for once a second."""

    def __init__(self, path: Path) -> None:
        self.path, self._exists, self._looked_at = path, False, -math.inf
        self._failed = False

    def exists(self) -> bool:
        if time.monotonic() >= self._looked_at + LOOK_INTERVAL_S:
            self._looked_at, self._exists = time.monotonic(), self._look()
        return self._exists

    def remove(self) -> None:
        """It was answered."""
        self._exists = False
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be removed: %s", self.path, reason_of(error))

    def _look(self) -> bool:
        try:
            return self.path.is_file()
        except OSError as error:  # a stale handle of a network disk, which often recovers: no reason to end a run
            if not self._failed:
                logger.warning("%s cannot be looked for: %s", self.path, reason_of(error))
            self._failed = True
            return False


class StopRequest:
    """Handles signals inside its `with`. SIGTERM may come twice (from SLURM and from torchrun); a
    second SIGINT stops now.

    SIGUSR2 is what `sbatch --signal=USR2@300` sends the ranks that srun started; torchrun would not
    forward it. `looks`: whether this rank looks for the stop-file, as one of each node does.
    """

    def __init__(self, looks: bool = True) -> None:
        self._signal = ""
        stop_file = os.environ.get("PIPELINE_STOP_FILE")
        self._stop_file = FileRequest(Path(stop_file)) if stop_file and looks else None
        deadline = os.environ.get("PIPELINE_DEADLINE") or "inf"
        try:
            self._deadline = float(deadline)
        except ValueError:
            raise UserError(f"invalid PIPELINE_DEADLINE {deadline!r}: expected Unix time, as of `date +%s`") from None
        past_s = time.time() - self._deadline
        if past_s > EXIT_MARGIN_S:
            if launch.rank() == 0:
                logger.warning("warning: PIPELINE_DEADLINE=%s was %.0f s ago: ignored", deadline, past_s)
            self._deadline = math.inf

    def __enter__(self) -> Self:
        # Python lets the main thread alone handle signals; in another the program around us does.
        is_main = threading.current_thread() is threading.main_thread()
        heeded = [number for number in SIGNALS_UNLESS_IGNORED if signal.getsignal(number) != signal.SIG_IGN]
        numbers = [*SIGNALS, *heeded] if is_main else []
        self._before = {number: signal.signal(number, self._notice) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # set where this rank has to outlive others
                signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # Only noted: the step that is running ends first.
        self._signal = signal.Signals(number).name
        again = "; Ctrl-C again exits without saving" if number == signal.SIGINT else ""
        said = "%s: saving after this step, then exiting%s", self._signal, again
        # In a thread: the line that this one was writing may hold the lock of the log.
        threading.Thread(target=logger.info, args=said, daemon=True).start()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self, needed_s: float) -> str:
        """Why this rank wants to stop, empty for no reason. `needed_s`: seconds for what has to be
        done before the deadline in any case: one more step and a save.
        """
        if self._signal:
            return self._signal
        if self._stop_file is not None and self._stop_file.exists():
            return f"stop-file {self._stop_file.path}"
        return self.deadline_reason(needed_s)

    def deadline_reason(self, needed_s: float) -> str:
        """`reason`, by the clock alone."""
        left_s = self._deadline - time.time()
        return f"deadline: {left_s:.0f} s left, a step and a save need {needed_s:.0f} s" if needed_s > left_s else ""
