"""`pipeline doctor --slurm FILE`: what is known to go wrong with a batch script, a line each."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import UserError
from pipeline.log import printable
from slurm.mistakes import examine


def run(path: Path, as_json: bool) -> None:
    """Print what is found, one line each. Raises UserError where a finding is an error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    try:
        found = examine(text)
    except RecursionError:
        raise UserError(f"{path} is no batch script: its quotes and brackets are nested too deep") from None
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        for finding in found:
            place = f"{path}:{finding.line}: {finding.level}"
            sys.stdout.write(printable(f"{place}: {finding.what}: {finding.why}; {finding.mend}") + "\n")
    sys.stdout.flush()
    errors = sum(finding.level == "error" for finding in found)
    if errors:
        raise UserError(f"{path} has {errors} error(s) and {len(found) - errors} warning(s), listed above")
    if not as_json:
        sys.stdout.write(f"{path}: no error, {len(found)} warning(s)\n")
