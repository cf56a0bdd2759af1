"""Batch scripts: their `#SBATCH` lines as sbatch reads them, and ours with a site's values filled in."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The short options of sbatch 22.05 whose long names matter here.
_LONG_NAMES = {
    "-A": "account", "-a": "array", "-c": "cpus-per-task", "-D": "chdir", "-e": "error", "-G": "gpus", "-J": "job-name",
    "-n": "ntasks", "-N": "nodes", "-o": "output", "-p": "partition", "-t": "time",
}  # fmt: skip
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
DEFAULT_LEAD_S = 60
# SLURM allows no larger MaxArraySize than one more.
LAST_ELEMENT = 4_000_000


@dataclass(frozen=True)
class Directive:
    """One option of a `#SBATCH` line; `value` is empty for an option that has none."""

    line: int
    name: str
    value: str


@dataclass(frozen=True)
class EarlySignal:
    """What `--signal=[B:]SIGNAL[@SECONDS]` asks for."""

    signal: str
    batch_shell_only: bool
    lead_s: int


def directives(text: str) -> list[Directive]:
    """The options that sbatch takes from a script. Of one that stands there twice the last counts."""
    found = []
    for number, line in enumerate(text.splitlines()[: first_command(text) - 1], start=1):
        if line.startswith("#SBATCH"):
            found += _options(number, line.removeprefix("#SBATCH"))
    return found


def values(text: str) -> dict[str, str]:
    """What a script asks for, by the options' names."""
    return {directive.name: directive.value for directive in directives(text)}


def first_command(text: str) -> int:
    """The number of the first line that is neither blank nor a comment: behind it sbatch looks for no more options."""
    lines = text.splitlines()
    commands = (number for number, line in enumerate(lines, start=1) if not re.match(r"\s*(#|$)", line))
    return next(commands, len(lines) + 1)


def _options(line: int, text: str) -> list[Directive]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # sbatch itself will say it
        return []
    found = []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            name, value = word[:2], word[2:].removeprefix("=")
        if not equals and not value and words and not words[0].startswith("-"):
            value = words.pop(0)
        found.append(Directive(line, _LONG_NAMES.get(name, name.removeprefix("--")), value))
    return found


def seconds(text: str) -> int | None:
    """A time as `--time` takes it: minutes, minutes:seconds, h:m:s, days-hours, days-h:m, days-h:m:s. None for others."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    first, second, third = (int(match[part] or 0) for part in ("first", "second", "third"))
    if match["days"] is not None:
        return ((int(match["days"]) * 24 + first) * 60 + second) * 60 + third
    if match["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def in_words(time_s: int) -> str:
    """Seconds as `days-h:mm:ss`."""
    days, rest = divmod(time_s, 86_400)
    return f"{f'{days}-' if days else ''}{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"


def early_signal(value: str) -> EarlySignal:
    """The meaning of `--signal`'s value."""
    flags, colon, rest = value.rpartition(":")
    name, _, lead = rest.partition("@")
    return EarlySignal(
        name.upper().removeprefix("SIG"), bool(colon) and "B" in flags.upper(), _number(lead, DEFAULT_LEAD_S)
    )


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isdigit() else otherwise


def elements(array: str) -> list[int]:
    """The numbers of `--array`, such as 0-7, 1,3,5 or 0-15:4, a limit (%2) left out; empty for what is none."""
    numbers: list[int] = []
    for part in array.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None or int(match[2] or match[1]) > LAST_ELEMENT:
            return []
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    return numbers


def file_name(pattern: str, known: Mapping[str, str]) -> str:
    """A pattern of `--output` with what is known of %x, %j, %A and %a in it, and %u, who submits. Others stay."""
    known = {"%u": os.environ.get("USER", "%u"), **known}
    return re.sub("|".join(known), lambda match: known[match[0]], pattern)


def find(name: str) -> Path:
    """One of our batch scripts, which lie beside this file."""
    return Path(__file__).with_name(name)


def fill(text: str, options: Mapping[str, str], prologue: list[str]) -> str:
    """A script with `options` in its `#SBATCH` lines and `prologue` before its first command.

    An option takes its line's place, or that of the `##SBATCH` line that proposes it; one with neither gets a line.
    """
    lines = text.splitlines()
    commands = first_command(text) - 1
    head = lines[:commands]
    for name, value in options.items():
        wanted = f"#SBATCH --{name}={shlex.quote(value)}"
        proposed = re.compile(rf"##?SBATCH --{re.escape(name)}(=|\s|$)")
        places = [number for number, line in enumerate(head) if proposed.match(line)]
        active = [number for number in places if head[number].startswith("#SBATCH")]
        if places:
            head[(active or places)[-1]] = wanted
        else:
            last = max((number for number, line in enumerate(head) if line.startswith("#SBATCH")), default=0)
            head.insert(last + 1, wanted)
    return "\n".join([*head, *prologue, *lines[commands:]]) + "\n"
