"""A GPT pretraining pipeline: raw text -> prepare -> shards -> train -> checkpoint -> sample ->
text.

In Python: `pipeline.load(checkpoint)`, `pipeline.open_dataset(path)` and `pipeline.train(config)`,
see docs/python.md.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

STAGES = ("prepare", "train", "sample", "score", "observe", "export", "slurm")
DOOR = ("Model", "Dataset", "Run", "load", "open_dataset", "train", "UserError")
# Not resolved: installers may link each file from a cache of theirs, but they keep packages side by
# side.
HOME = Path(__file__).absolute().parents[1]


class StageFinder:
    """Finds the stages' packages where `pipeline` lies, whatever comes first on sys.path.

    The working folder often does, and every nanoGPT checkout has a train.py and a sample.py.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(HOME)]) if name in STAGES else None


def __getattr__(name: str) -> Any:
    """What pipeline/api.py offers, imported when it is first used: most of it needs torch."""
    if name not in DOOR:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    _forget_other_stages()
    return getattr(import_module("pipeline.api"), name)


def _forget_other_stages() -> None:
    """A notebook may have imported a train.py of the user's before: it keeps the module, and we
    take the name.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in STAGES and not (file and Path(file).is_relative_to(HOME)):
            del sys.modules[name]


def __dir__() -> list[str]:
    return [*globals(), *DOOR]


sys.meta_path.insert(0, StageFinder)
