"""How a measurement is taken and kept: the sides take turns on one machine, and every figure of every turn is recorded.

A module of this folder holds only what it measures, as MEASUREMENTS. Each runs alone, as `python -m benchmarks.step`.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import orjson

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks.json"
HERE = "here"  # the name of our side
PACKAGES = ("torch", "numpy", "transformers", "tiktoken", "datasets", "gigatoken")


@dataclass(frozen=True)
class Options:
    """`tiny`: sizes that only show that a measurement runs; `nanogpt`: a checkout; `text`: tinyshakespeare."""

    tiny: bool = False
    nanogpt: Path | None = None
    text: Path | None = None


Turn = Callable[[], dict[str, float]]  # one turn of a side: figures by name
Sides = dict[str, Turn | str]  # by name, ours first under HERE; instead of a turn the reason why there is none


@dataclass(frozen=True)
class Measurement:
    """`name`: GROUP.CASE; `figures`: units by name, of which a peer may lack some; `sides` opens the contestants.
    Without `warm_up` the first turn counts, as it should where a turn is a program of its own.
    """

    name: str
    title: str
    figures: dict[str, str]
    sides: Callable[[Options], AbstractContextManager[Sides]]
    turns: int = 5
    warm_up: bool = True


@dataclass(frozen=True)
class Machine:
    """What figures depend on besides the code."""

    machine: str
    date: str
    commit: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Row:
    """A figure against one peer, turn by turn. `ratios`: how many times better here, by turn. Without a peer's
    figures, `note` says why.
    """

    measurement: str
    figure: str
    peer: str
    title: str
    unit: str
    here: list[float]
    there: list[float]
    ratios: list[float]
    machine: str
    date: str
    commit: str
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.measurement, self.figure, self.peer

    @property
    def group(self) -> str:
        return self.measurement.partition(".")[0]


def take_turns(sides: dict[str, Turn], turns: int, warm_up: bool = False) -> dict[str, list[dict[str, float]]]:
    """The figures of every side, turn by turn. Every other turn goes backwards, so that none is always first."""
    if warm_up:
        for turn in sides.values():
            turn()
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(turns):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            taken[name].append(sides[name]())
    return taken


def how_many_times_better(here: float, there: float, unit: str) -> float:
    """Above 1 is better here: more of a rate, less of anything else."""
    over, under = (here, there) if unit.endswith("/s") else (there, here)
    return over / under


def measure(measurement: Measurement, options: Options, machine: Machine, turns: int = 0) -> list[Row]:
    """Its rows: one for each figure and peer."""
    with measurement.sides(options) as sides:
        if isinstance(sides[HERE], str):
            print(f"{measurement.name}: not measured: {sides[HERE]}")
            return []
        takers = {name: turn for name, turn in sides.items() if not isinstance(turn, str)}
        taken = take_turns(takers, turns or measurement.turns, measurement.warm_up)
    rows = []
    for figure, unit in measurement.figures.items():
        here = [turn[figure] for turn in taken[HERE]]
        peers = [name for name in sides if name not in taken or (name != HERE and figure in taken[name][0])]
        for peer in peers or [""]:  # a figure that no peer has
            there = [turn[figure] for turn in taken.get(peer, [])]
            ratios = [how_many_times_better(a, b, unit) for a, b in zip(here, there, strict=False)]
            known = {"title": measurement.title, "unit": unit, "note": "" if there else str(sides.get(peer, ""))}
            known |= vars(machine)
            rows.append(Row(measurement.name, figure, peer, here=here, there=there, ratios=ratios, **known))
    return rows


# ---- the file of results ----


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in orjson.loads(path.read_bytes())] if path.exists() else []


def write_rows(path: Path, rows: list[Row]) -> None:
    """A line each, so that a diff shows which were measured anew."""
    path.write_bytes(b"[\n" + b",\n".join(orjson.dumps(asdict(row)) for row in rows) + b"\n]\n")


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """`new` in the place of the same measurements; a peer that is not measured now keeps its older row."""
    kept = {row.key: row for row in old if row.there}
    new = [kept.get(row.key, row) if row.peer and not row.there else row for row in new]
    names = list(dict.fromkeys(row.measurement for row in [*old, *new]))
    anew = {row.measurement for row in new}
    return [row for name in names for row in (new if name in anew else old) if row.measurement == name]


# ---- the machine ----


def this_machine() -> Machine:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    name = re.search(r"model name\s*: (.+)", text)
    units = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{flag}\b", text)][:1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    what = f"{cores} core(s) of {name[1].strip() if name else 'unknown'} ({', '.join(units)}), {memory:.0f} GB"
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    if gpus:
        what += f", {len(gpus)} x {gpus[0].read_text().partition(chr(10))[0].partition(':')[2].strip()}"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": sys.version.partition(" ")[0]}
    versions |= {package: version(package) for package in PACKAGES if find_spec(package)}
    return Machine(what, datetime.date.today().isoformat(), commit, versions)


# ---- what measurements share ----


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(command: Sequence[str | Path], folder: Path = ROOT, **variables: str) -> str:
    """The stdout of a program. A failure ends the benchmark with the end of what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


PIPELINE = [sys.executable, "-m", "pipeline"]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks")
    found.add_argument("--only", default="", help="groups or measurements, separated by commas")
    found.add_argument("--turns", type=int, default=0, help="of each side, instead of the measurement's number")
    found.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    found.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to compare with")
    found.add_argument("--text", type=Path, help="the tinyshakespeare text")
    found.add_argument("--results", type=Path, help="the JSON file in which rows are replaced")
    return found


def main(measurements: Iterable[Measurement]) -> None:
    """Take those that --only names, print their table, and put their rows into the file of results."""
    from benchmarks.page import table

    arguments, machine = parser().parse_args(), this_machine()
    only = [name for name in arguments.only.split(",") if name]
    options = Options(arguments.tiny, *(path and path.resolve() for path in (arguments.nanogpt, arguments.text)))
    for measurement in measurements:
        if not only or {measurement.name, measurement.name.partition(".")[0]} & set(only):
            rows = measure(measurement, options, machine, arguments.turns)
            print("\n".join(table(rows)), flush=True)
            if arguments.results:  # after each, so that a failure later costs nothing
                write_rows(arguments.results, merge(read_rows(arguments.results), rows))
