"""`pipeline doctor`: is this machine fit to train on? Every check in turn, one line each."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from observe.doctor import folders, system
from observe.doctor.findings import Check, Finding, Status, fail
from pipeline.config.keys import Config
from pipeline.errors import UserError, one_line
from pipeline.log import printable

# torch from a shared disk may take a minute to import: here, in torchrun and in its ranks.
MEASURED_LIMIT_S = 240.0


def measure() -> Iterator[Finding]:
    try:
        from observe.doctor import speed  # and torch, in the process of this check alone
    except (ImportError, OSError) as error:
        yield fail(
            "torch", f"cannot be imported: {one_line(error)}", "install it again: pip install --force-reinstall torch"
        )
        return
    yield from speed.examine()


def checks() -> list[Check]:
    config = Config()
    return [
        Check("versions", system.versions),
        Check("compiler", system.compiler),
        Check("cpu", system.cpu),
        Check("memory", system.memory),
        Check("limits", system.limits),
        Check("clock", system.clock),
        Check("host name", system.host_name),
        Check("data folder", partial(folders.check_folder, "data folder", Path(config.data.data_dir)), limit_s=60),
        Check("run folder", partial(folders.check_folder, "run folder", Path(config.run.dir)), limit_s=60),
        Check("gpu", system.gpus),
        Check("torch", measure, limit_s=MEASURED_LIMIT_S),
    ]


def run(as_json: bool) -> None:
    """Print what is found. Raises UserError if a check failed."""
    found = []
    # One check at a time: they would disturb each other's speed.
    for finding in (finding for check in checks() for finding in check.run()):
        found.append(finding)
        if not as_json:
            advice = f"; {finding.advice}" if finding.advice else ""
            line = f"{finding.status:<5} {finding.check:<17} {finding.found}{advice}"
            sys.stdout.write(printable(" ".join(line.splitlines())) + "\n")
            sys.stdout.flush()
    count = {status: sum(finding.status is status for finding in found) for status in Status}
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        sys.stdout.write(f"{count[Status.OK]} ok, {count[Status.WARN]} warning(s), {count[Status.FAIL]} failure(s)\n")
    sys.stdout.flush()
    if count[Status.FAIL]:
        raise UserError(f"{count[Status.FAIL]} check(s) failed, listed above")
