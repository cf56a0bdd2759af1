"""`log.profile_steps`: where the time and the memory of some steps went."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import profile, schedule

from pipeline.config.keys import Config
from pipeline.log import logger
from pipeline.runs import RunFolder

MOST_EVENTS = 1_000_000  # of the memory's history, in which one allocation is an event


@contextmanager
def profiling(config: Config, is_first: bool) -> Iterator[Callable[[], None]]:
    """Call what this yields after each step. From the first rank, a trace of the third step and those after
    it (https://ui.perfetto.dev shows it) and, on a GPU, a snapshot of its memory (pytorch.org/memory_viz).
    """
    steps, folder = config.log.profile_steps, RunFolder(config.run_dir).profile
    if not steps or not is_first:
        yield lambda: None
        return
    memory = torch.cuda.memory if torch.cuda.is_available() else None

    def save(profiler: profile) -> None:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        if memory:
            memory._dump_snapshot(str(folder / "memory_snapshot.pickle"))
            memory._record_memory_history(enabled=None)
        logger.info("profile of %d steps: %s", steps, folder)

    if memory:
        memory._record_memory_history(max_entries=MOST_EVENTS)
    # The first step compiles, and the second one starts the profiler.
    phases = schedule(wait=1, warmup=1, active=steps, repeat=1)
    with profile(schedule=phases, on_trace_ready=save, record_shapes=True, profile_memory=True) as profiler:
        yield profiler.step
