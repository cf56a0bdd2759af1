"""`pipeline doctor`: is this machine fit to train on? Every check in turn, one line each."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from observe.doctor import folders, system
from observe.doctor.findings import Check, Finding, Status, fail
from observe.tables import print_json
from pipeline.config.keys import Config
from pipeline.errors import UserError, one_line
from pipeline.log import printable

# torch from a shared disk may take a minute to import: here, in torchrun and in its ranks.
MEASURED_LIMIT_S = 240.0


def measure() -> Iterator[Finding]:
    try:
        from observe.doctor import speed  # and torch, in the process of this check alone
    except (ImportError, OSError) as error:
        advice = "install it again: pip install --force-reinstall torch"
        yield fail("torch", f"cannot be imported: {one_line(error)}", advice)
    else:
        yield from speed.examine()


def checks() -> list[Check]:
    config = Config()
    paths = {"data folder": config.data.data_dir, "run folder": config.run.dir}
    return [
        *(Check(find.__name__.replace("_", " "), find) for find in system.CHECKS),
        *(Check(name, partial(folders.check_folder, name, Path(path)), limit_s=60) for name, path in paths.items()),
        Check("torch", measure, limit_s=MEASURED_LIMIT_S),
    ]


def run(as_json: bool) -> None:
    """Print what is found. Raises UserError if a check failed."""
    found = []
    # One check at a time: they would disturb each other's speed.
    for finding in itertools.chain.from_iterable(check.run() for check in checks()):
        found.append(finding)
        if not as_json:
            advice = f"; {finding.advice}" if finding.advice else ""
            line = f"{finding.status:<5} {finding.check:<17} {finding.found}{advice}"
            sys.stdout.write(printable(" ".join(line.splitlines())) + "\n")
            sys.stdout.flush()
    count = Counter(finding.status for finding in found)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        sys.stdout.write(f"{count[Status.OK]} ok, {count[Status.WARN]} warning(s), {count[Status.FAIL]} failure(s)\n")
    sys.stdout.flush()
    if count[Status.FAIL]:
        raise UserError(f"{count[Status.FAIL]} check(s) failed, listed above")
