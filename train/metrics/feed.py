"""The process that feeds one library of log.also: `python feed.py NAME RUN`, with the config and then the
rows on stdin. It imports nothing of ours, and ends when stdin does, however the run ended.
"""

import importlib
import json
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROJECT = "gpt-pipeline"


def feed(name: str, run: Path, lines: Iterable[str]) -> None:
    """Hand every row to the library of that name."""
    messages, library = map(json.loads, lines), importlib.import_module(name)
    config = {f"{section}.{key}": value for section, keys in next(messages).items() for key, value in keys.items()}
    if name == "mlflow":
        library.set_experiment(PROJECT)
        library.start_run(run_name=run.name)
        library.log_params(config)
        write, finish = library.log_metrics, library.end_run
    else:
        more: dict[str, Any] = {}
        if name == "wandb":
            # Without a key it would ask for one. `wandb sync` uploads later what was written offline.
            mode = os.environ.get("WANDB_MODE") or ("online" if library.api.api_key else "offline")
            # By its id a resumed run is known to be the same one.
            more = {"dir": run, "id": uuid.uuid5(uuid.NAMESPACE_URL, run.as_uri()).hex, "mode": mode}
        library.init(project=PROJECT, name=run.name, config=config, resume="allow", **more)
        write, finish = library.log, library.finish
    for row in messages:
        write(row, step=row.pop("step"))
    finish()


if __name__ == "__main__":
    lines, answer = os.fdopen(os.dup(0)), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # where the library asks on the keyboard
    os.dup2(2, 1)  # whatever it prints, and the processes that it starts
    try:
        feed(sys.argv[1], Path(sys.argv[2]), lines)
    except Exception as error:
        os.write(answer, type(error).__name__.encode())  # its text may hold a token, or an address with a password
        sys.exit(1)
