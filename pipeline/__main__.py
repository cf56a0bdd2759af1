"""`python -m pipeline`, which is also how torchrun starts a rank: `torchrun -m pipeline train`."""

import sys
from pathlib import Path

from pipeline import HOME


def forget_working_folder() -> None:
    """Take the working folder, which `-m` puts first, off sys.path: a datasets.py or numpy.py there
    is not the library.
    """
    here = Path.cwd().resolve()
    # In a checkout the packages themselves lie in the working folder.
    if here != HOME.resolve():
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]


if __name__ == "__main__":
    # Below the test, because the workers of `prepare` import this module again and have no use for
    # a command line.
    forget_working_folder()
    from pipeline.cli.main import main

    main()
