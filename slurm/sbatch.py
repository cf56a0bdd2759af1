"""Batch scripts: directives as sbatch parses them, and our scripts with values filled in."""

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
NO_LIMIT = ("INFINITE", "UNLIMITED")
# What SLURM takes where --signal names no seconds.
DEFAULT_LEAD_S = 60
# SLURM allows no larger MaxArraySize than this plus one.
LAST_ELEMENT = 4_000_000
SLURMS_LOG = "slurm-%j.out"


@dataclass(frozen=True)
class Directive:
    """One option of a `#SBATCH` line; `value` is empty for an option that takes none."""

    line: int
    name: str
    value: str


@dataclass(frozen=True)
class EarlySignal:
    """What `--signal=[B:]SIGNAL[@SECONDS]` asks for."""

    batch_shell_only: bool
    lead_s: int


def directives(text: str) -> list[Directive]:
    """The options that sbatch takes from a script. The last one of a name counts."""
    found = []
    for number, line in enumerate(text.splitlines()[: first_command(text) - 1], start=1):
        if line.startswith("#SBATCH"):
            found += _options(number, line.removeprefix("#SBATCH"))
    return found


def values(text: str) -> dict[str, str]:
    """A script's options and their values, by long name."""
    return {directive.name: directive.value for directive in directives(text)}


def first_command(text: str) -> int:
    """The number of the first line that is a command: sbatch reads no options after it."""
    lines = text.splitlines()
    commands = (number for number, line in enumerate(lines, start=1) if not re.match(r"\s*(#|$)", line))
    return next(commands, len(lines) + 1)


def _options(line: int, text: str) -> list[Directive]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # an unclosed quote, which sbatch itself reports
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
    """Seconds of a limit in minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None if invalid."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    first, second, third = (int(match[part] or 0) for part in ("first", "second", "third"))
    if match["days"] is not None:
        return ((int(match["days"]) * 24 + first) * 60 + second) * 60 + third
    if match["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def format_time(limit: str) -> str:
    """A time limit as `d-h:mm:ss`."""
    limit_s = seconds(limit)
    if not limit_s:
        return "unlimited time"
    days, rest = divmod(limit_s, 86_400)
    return f"{f'{days}-' if days else ''}{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"


def early_signal(value: str) -> EarlySignal:
    """The meaning of `--signal`'s value."""
    flags, colon, rest = value.rpartition(":")
    lead = rest.partition("@")[2]
    return EarlySignal(bool(colon) and "B" in flags.upper(), int(lead) if lead.isdigit() else DEFAULT_LEAD_S)


def gpu_count(value: str) -> int | None:
    """The number in `[TYPE:]N`, as --gpus-per-node takes it; None if invalid."""
    match = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", value)
    return int(match[1]) if match else None


def gpus_of(other: str) -> str | None:
    """What another option asks for in GPUs of a node that has one task: `gres=gpu:h100:2` or
    `gpus-per-task=2`; None if it asks for none.
    """
    name, _, value = other.partition("=")
    if name == "gres":
        value = next((part for part in value.split(",") if re.match(r"gpu(:|$)", part)), "")
        # A type or nothing stands for one of them.
        return (value and (value.removeprefix("gpu:") if value[-1].isdigit() and ":" in value else "1")) or None
    return value if name == "gpus-per-task" else None


def elements(array: str) -> list[int]:
    """The indices of `--array` (0-7, 1,3,5 or 0-15:4), without a limit (%2); empty if invalid."""
    numbers: list[int] = []
    for part in array.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None or int(match[2] or match[1]) > LAST_ELEMENT:
            return []
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    return numbers


def file_name(pattern: str, known: Mapping[str, str]) -> str:
    """`--output` with %u, the user, and the `known` ones of %x, %j, %A and %a replaced."""
    known = {"%u": os.environ.get("USER", "%u"), **known}
    return re.sub("|".join(known), lambda match: known[match[0]], pattern)


def option(name: str, value: str) -> str:
    """An option as sbatch takes it, one without a value (`--exclusive`) too."""
    return f"--{name}={value}" if value else f"--{name}"


def find(name: str) -> Path:
    """One of our batch scripts, which are next to this file."""
    return Path(__file__).with_name(name)


def fill(text: str, options: Mapping[str, str], prologue: list[str]) -> str:
    """A script with `options` in its `#SBATCH` lines and `prologue` before its first command.

    An option replaces its own line, or the `##SBATCH` line that suggests it; one with neither gets
    a new line.
    """
    lines = text.splitlines()
    commands = first_command(text) - 1
    head = lines[:commands]
    for name, value in options.items():
        filled = f"#SBATCH {option(name, shlex.quote(value) if value else '')}"
        pattern = re.compile(rf"##?SBATCH --{re.escape(name)}(=|\s|$)")
        matches = [number for number, line in enumerate(head) if pattern.match(line)]
        active = [number for number in matches if head[number].startswith("#SBATCH")]
        if matches:
            head[(active or matches)[-1]] = filled
        else:
            last = max((number for number, line in enumerate(head) if line.startswith("#SBATCH")), default=0)
            head.insert(last + 1, filled)
    return "\n".join([*head, *prologue, *lines[commands:]]) + "\n"
