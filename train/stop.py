"""When to stop before the last step: a signal, a stop-file, a deadline such as SLURM's time limit.

A rank only notices; at the end of the step the trainer makes all ranks agree, saves, and exits with
code 0. Nothing is saved inside a signal handler, where half a step may be in flight.

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
from pipeline.errors import UserError
from pipeline.log import logger

# A save is given twice the time the last one took; before any was made, this many seconds.
FIRST_SAVE_S = 30.0
# The batch scripts set the deadline this many seconds before the job ends. One that passed earlier
# than that when the run starts belongs to another job, and would stop every start of the run after
# one step.
EXIT_MARGIN_S = 60.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Handles signals inside its `with`. SIGTERM may come twice (from SLURM and from torchrun); a
    second SIGINT stops now.

    SIGUSR2 is what `sbatch --signal=USR2@300` sends the ranks that srun started; torchrun would not
    forward it.
    """

    def __init__(self) -> None:
        self._signal = ""
        stop_file = os.environ.get("PIPELINE_STOP_FILE")
        self._stop_file = Path(stop_file) if stop_file else None
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
        numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._notice) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # set where this rank has to outlive others
                signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # Only noted: the step that is running ends first.
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self, step_s: float, save_s: float | None) -> str:
        """Why this rank wants to stop, empty for no reason. `step_s`: seconds that one more step
        and its evaluation take; `save_s`: that the last save took.
        """
        if self._signal:
            return self._signal
        if self._stop_file is not None and self._stop_file.exists():
            return f"stop-file {self._stop_file}"
        needed_s = step_s + 2 * (FIRST_SAVE_S if save_s is None else save_s)
        if time.time() + needed_s > self._deadline:
            return f"deadline: {self._deadline - time.time():.0f} s left, a step and a save need {needed_s:.0f} s"
        return ""
